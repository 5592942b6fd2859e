"""Model folders to publish."""

from pathlib import Path

import torch
from transformers import ConvNextConfig, ConvNextImageProcessor, ResNetConfig, TimmBackboneConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

LABELS = {index: label for index, label in enumerate(["cat", "dog", "fish", "bird", "boat"])}
LITE0_NECK = [
    {"type": "conv", "out_channels": 1280},
    {"type": "batch_norm", "eps": 1e-3},
    {"type": "activation", "function": "relu6"},
]
BACKBONES = {
    "resnet": lambda: {
        "backbone_config": ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic"
        )
    },
    "convnext": lambda: {"backbone_config": ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4)},
    "efficientnet_lite0": lambda: {
        "backbone_config": TimmBackboneConfig(backbone="tf_efficientnet_lite0", out_indices=[0, 1, 2, 3, 4]),
        "neck_layers": LITE0_NECK,
    },
}


def make_model(kind: str = "resnet", seed: int = 0) -> CAStreamForImageClassification:
    """A classifier with random weights, whose attention is far from uniform."""
    torch.manual_seed(seed)
    labels = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    model = CAStreamForImageClassification(CAStreamConfig(**BACKBONES[kind](), **labels)).eval()
    with torch.no_grad():
        for parameter in model.castream.stream.parameters():
            parameter.normal_(std=0.5)
    return model


def save_model(folder: Path, kind: str = "resnet", seed: int = 0, **kwargs) -> CAStreamForImageClassification:
    """Write a model folder as training leaves it: model, code, image processor."""
    model = make_model(kind, seed)
    model.save_pretrained(folder, **kwargs)
    ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(folder)
    return model


def entry(mean: float, half: float = 1.0) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "images": 40}


def make_results(model: str = "model", **changes) -> dict:
    """Content of a results.json, with control rows and one figure that was not measured."""

    def row(method, pooling, control, drop):
        metrics = {"average_drop": entry(drop), "insertion": None if control == "area" else entry(drop / 2)}
        return {"method": method, "pooling": pooling, "control": control, "scoring": pooling, "metrics": metrics}

    def pair(method, control, drop):
        return {"method": method, "control": control, "metrics": {"average_drop": entry(drop), "insertion": None}}

    results = {
        "model": model,
        "dataset": "some/dataset",
        "settings": {"protocol": "reference", "target": "label", "methods": ["grad_cam"]},
        "sample": {
            "images": 40,
            "maps_explained": 40,
            "images_without_label": 3,
            "skipped": [{"id": "a", "reason": "b"}],
        },
        "accuracy": {"gap": entry(70.125), "ca": entry(71.5), "ca_minus_gap": entry(1.375)},
        "rows": [
            row("grad_cam", "gap", "", 20.0),
            row("grad_cam", "ca", "", 18.0),
            row("grad_cam", "ca", "area", 19.0),
            row("random_map", "gap", "", 40.0),
        ],
        "ca_minus_gap": [pair("grad_cam", "", -2.0), pair("grad_cam", "area", -0.25)],
        "method_minus_reference": [],
    }
    return results | changes
