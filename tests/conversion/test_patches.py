"""SigLIP 2, whose own processor cuts photos of any aspect ratio into patches: its conversion reads the photos whole."""

import numpy as np
import pytest
import torch
from castream.artifacts.models import load_image_processor
from castream.conversion.command import main
from castream.conversion.parity import example_images
from castream.data.transforms import ImageTransform
from castream.evaluation.data import Preprocessor
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor, AutoModelForImageClassification, Siglip2ImageProcessor, ViTImageProcessor
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches
from typer.testing import CliRunner

from castream.command import app
from modeling_castream import CAStreamForImageClassification, CAStreamPatchImageProcessor
from modeling_castream.network_castream import network_arguments
from modeling_castream.preprocessing_castream import visible_box
from tests.fresh_process import run_fresh

ROW = "transformers:siglip2"
WITHOUT_TORCHVISION = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("torchvision") else find_spec(name, *rest)
from transformers import AutoImageProcessor, AutoModelForImageClassification

AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)
try:
    AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
GRIDS = [(3, 4), (4, 3), (4, 4), (3, 5)]  # of the example images, in at most 16 patches


@torch.no_grad()
def test_photos_of_all_shapes_are_classified_as_the_source_classifies_them_in_one_padded_batch(convert_row):
    converted = convert_row(ROW)
    batch = AutoImageProcessor.from_pretrained(converted.source)(example_images(), return_tensors="pt")
    assert batch["spatial_shapes"].tolist() == [list(grid) for grid in GRIDS]
    expected = AutoModelForImageClassification.from_pretrained(converted.source)(**batch).logits
    processor = load_image_processor(converted.folder)
    assert type(processor) is CAStreamPatchImageProcessor
    model = CAStreamForImageClassification.from_pretrained(converted.folder)
    for image, grid, logits in zip(example_images(), GRIDS, expected, strict=True):
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        found = model(pixel_values, pooling="source")
        assert (found.logits[0] - logits).abs().max() <= 1e-5 * max(1.0, logits.abs().max())
        assert found.attention_maps[-1].shape[2:] == grid


def test_the_processor_returns_the_resized_photo_itself():
    processor = CAStreamPatchImageProcessor(max_num_patches=16, image_mean=[0.1, 0.2, 0.3])
    found = processor(example_images())["pixel_values"]
    for image, (rows, columns), pixels in zip(example_images(), GRIDS, found, strict=True):
        photo = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        expected = tvF.resize(photo, [16 * rows, 16 * columns]) / 255
        expected = (expected - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    [smaller] = processor(example_images()[:1], patch_size=8)["pixel_values"]
    assert smaller.shape == (3, 24, 32)


def test_patches_lie_as_transformers_lays_them(convert_row):
    config = CAStreamForImageClassification.from_pretrained(convert_row(ROW).folder).config.backbone_config
    images = torch.randn(2, 3, 48, 80)
    patches, mask, shapes = network_arguments(config, images)
    assert torch.equal(patches, torch.stack([convert_image_to_patches(image, 16) for image in images]))
    assert mask is None and shapes.tolist() == [[3, 5]]
    with pytest.raises(ValueError, match="height and width must be multiples of 16, got 48 x 70"):
        network_arguments(config, images[..., :70])


def test_a_model_is_made_for_as_many_patches_as_it_has_positions(convert_row):
    model = CAStreamForImageClassification.from_pretrained(convert_row(ROW).folder)
    assert model.castream.backbone.image_shape == (3, 64, 64)


def test_explain_shows_the_whole_photo(convert_row, tmp_path):
    converted = convert_row(ROW)
    for index, image in enumerate(example_images()[:2]):
        image.save(tmp_path / f"{index}.png")
        box = visible_box(load_image_processor(converted.folder), *image.size)
        assert np.allclose(box, (0, 0, *image.size), atol=2)
    arguments = [tmp_path / "0.png", tmp_path / "1.png", "--model", converted.folder, "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)])
    assert result.exit_code == 0 and "2 explained" in result.output, result.output
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_what_needs_photos_of_one_size_is_refused(convert_row):
    processor = load_image_processor(convert_row(ROW).folder)
    with pytest.raises(ValueError, match="prepares images in a way that training does not"):
        ImageTransform(processor, "none")
    with pytest.raises(ValueError, match="returns images of different sizes"):
        Preprocessor(processor).normalized(example_images())


def test_a_folder_without_its_own_kind_of_processor_is_refused_in_one_line(convert_row, tmp_path, capsys):
    source = AutoModelForImageClassification.from_pretrained(convert_row(ROW).source)
    source.save_pretrained(tmp_path / "source")
    ViTImageProcessor().save_pretrained(tmp_path / "source")
    capsys.readouterr()
    assert main(["classifier", "--source", str(tmp_path / "source"), "--output", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "SigLIP 2 goes with a Siglip2ImageProcessor" in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_without_trust_no_processor_stands_in(convert_row):
    """Transformers' own would hand lists of patches to a model that reads images."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoImageProcessor.from_pretrained(convert_row(ROW).folder, trust_remote_code=False)
    assert issubclass(CAStreamPatchImageProcessor, Siglip2ImageProcessor)
    assert CAStreamPatchImageProcessor()(Image.new("RGB", (40, 40)))["pixel_values"][0].shape == (3, 256, 256)


def test_without_torchvision_the_model_loads_and_the_processor_says_what_it_needs(convert_row, tmp_path):
    said = run_fresh(f"FOLDER = {str(convert_row(ROW).folder)!r}" + WITHOUT_TORCHVISION, tmp_path)
    assert "ImageProcessor requires the Torchvision library" in said
