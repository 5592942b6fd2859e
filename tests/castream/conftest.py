"""A small model, photos, and a cache that is the test's own."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

LABELS = ["tabby", "dog", "a/b: c"]


def draw_photo(seed: int, size=(90, 60)) -> Image.Image:
    """Smooth blobs of colour."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def resnet() -> ResNetConfig:
    labels = dict(enumerate(LABELS))
    return ResNetConfig(
        **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        **{"id2label": labels, "label2id": {label: index for index, label in labels.items()}},
    )


def save_processor(folder) -> None:
    ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(folder)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A castream model with a stream that is not uniform."""
    torch.manual_seed(4)
    config = CAStreamConfig(backbone_config=resnet(), id2label=resnet().id2label, label2id=resnet().label2id)
    model = CAStreamForImageClassification(config)
    with torch.no_grad():
        for parameter in (*model.castream.stream.parameters(), model.classifier.weight):
            parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory):
    """A classifier that is no castream model yet."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("classifier")
    ResNetForImageClassification(resnet()).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with two photos, one of them turned, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    draw_photo(1).save(folder / "one.png")
    exif = Image.Exif()
    exif[274] = 6  # Orientation: turned by 90 degrees
    draw_photo(2).save(folder / "deeper" / "one.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"text")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CASTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"
