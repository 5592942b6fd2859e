"""A tiny CA-Stream folder, a tiny dataset and quick settings for the tests of training."""

import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import BitImageProcessor, ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.training.tiny_data import CLASSES, write_shards


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_shards(folder, "train", [11, 7, 9, 5])
    write_shards(folder, "validation", [6, 6])
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-stage ResNet for three classes."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config = CAStreamConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    CAStreamForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny_model, tiny_dataset, tmp_path) -> dict:
    """Settings of a run that takes a second."""
    return {
        "model": str(tiny_model),
        "variant": "stream",
        "dataset_name": str(tiny_dataset),
        "output_dir": str(tmp_path / "run"),
        "num_workers": 0,
        "batch_size": 4,
        "epochs": 2,
        "shuffle_window": 6,
        "interleave": 2,
        "cache_features": False,
        "views": None,
        "augmentation": "flip",
        "tracker": "none",
        "checkpoint_steps": 3,
        "log_steps": 1,
        "validation_split": None,
        "learning_rate": 0.01,
        "mixed_precision": "no",
    }


@pytest.fixture
def fresh_process_state():
    """Accelerate's state and the signal handlers as a new process has them."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    reset()
    yield reset
    reset()
    for number, handler in handlers.items():
        signal.signal(number, handler)
