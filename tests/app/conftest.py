"""The app's modules, imported as its Space imports them, and a model to show."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

APP = Path(__file__).parents[2] / "app"


@pytest.fixture(scope="session", autouse=True)
def app_modules():
    sys.path.insert(0, str(APP))
    yield
    sys.path.remove(str(APP))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small classifier whose processor cuts off the image's margins, and whose classes depend on the photo."""
    torch.manual_seed(4)
    labels = ["tabby <cat>", "dog", "fish", "bird", "boat", "kite"]
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic")
    config = CAStreamConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = CAStreamForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.castream.stream.parameters():
            parameter.normal_(std=0.5)
        model.classifier.weight.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("model_to_show")
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 128}, crop_pct=0.875).save_pretrained(folder)
    return folder


def draw_photo(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Smooth blobs of colour: something that maps can differ on and that resizing hardly changes."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return Image.fromarray(generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Paths of two photos whose most likely classes differ, as a test relies on."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for seed in (1, 2):
        paths.append(folder / f"photo{seed}.png")
        draw_photo(seed).save(paths[-1])
    return paths
