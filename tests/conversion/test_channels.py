"""Classifiers of one and four channels, and processors that give every photo its own size."""

import numpy as np
import pytest
import torch
from castream.conversion.command import main
from PIL import Image
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline


def write_source(folder, channels: int, **processor) -> None:
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape, num_channels=channels, num_labels=3)).save_pretrained(folder)
    options = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    options |= {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "do_convert_rgb": channels == 3}
    BitImageProcessor(**options | processor).save_pretrained(folder)


@pytest.mark.parametrize("channels", [1, 4])
def test_networks_of_one_and_four_channels_convert_and_explain(tmp_path, channels):
    write_source(tmp_path / "source", channels)
    assert main(["classifier", "--source", str(tmp_path / "source"), "--output", str(tmp_path / "model")]) == 0
    explain = pipeline("image-explanation", model=str(tmp_path / "model"), trust_remote_code=True)
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    (answer,) = explain(Image.fromarray(noise), top_k=1, method="eigen_cam")
    assert answer["overlay"].size == (100, 80) and answer["saliency"].max() > 0.9
    assert np.allclose(answer["box"], (10, 0, 90, 80), atol=0.5)


def test_a_processor_that_keeps_the_aspect_ratio_is_proved_image_by_image(tmp_path):
    write_source(tmp_path / "source", 3, do_center_crop=False)
    assert main(["classifier", "--source", str(tmp_path / "source"), "--output", str(tmp_path / "model")]) == 0


def test_a_processor_of_other_channels_is_refused_in_one_line(tmp_path, capsys):
    write_source(tmp_path / "source", 4, do_convert_rgb=True)
    assert main(["classifier", "--source", str(tmp_path / "source"), "--output", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "the image processor makes no pixels of a picture in mode RGB" in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
