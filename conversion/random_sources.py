"""Small classifiers of every kind with random weights, for the tests and the coverage's table."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BitConfig,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    ViTImageProcessor,
)

from .parity import example_images
from .torchvision_families import published_weights

_LABELS = 7
_SIZE = 64
TRANSFORMERS = {
    "resnet": ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 2, 1, 1], layer_type="basic"),
    "convnext": ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
    "convnextv2": ConvNextV2Config(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
    "swin": SwinConfig(image_size=64, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=4),
    "dinov2": Dinov2Config(
        image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2
    ),
    "dinov2_with_registers": Dinov2WithRegistersConfig(
        image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2
    ),
    "bit": BitConfig(embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 2, 1], num_groups=4),
    "bit, bottleneck blocks": BitConfig(
        embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 2, 1], num_groups=4, layer_type="bottleneck"
    ),
}
_TIMM = (
    "resnet18",
    "resnext26ts",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnetv2_50",
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "densenet121",
    "convnext_atto",
    "convnextv2_atto",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
)
TORCHVISION = ("resnet18", "resnet50", "convnext_tiny", "efficientnet_b0", "efficientnet_b5")
ROWS = (
    *(f"transformers:{family}" for family in TRANSFORMERS),
    *(f"timm:{name}" for name in _TIMM),
    *(f"torchvision:{name}" for name in TORCHVISION),
    "pypi:efficientnet-lite0",
)


@torch.no_grad()
def randomise(model: nn.Module, size: int) -> nn.Module:
    """Move a fresh network off its trivial values.

    Biases, scales and other vectors that start at a constant become random. Batch normalisation takes the statistics of
    noise and pictures of (size, size) pixels, which keeps the signal in bounds, and these are made random too.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            start = parameter.flatten()[0].item() if parameter.flatten()[0].abs() > 1e-3 else 0.1
            parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    pictures = [np.asarray(image.resize((size, size))) for image in example_images()]
    pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 64 - 2
    model.train()(torch.cat([torch.randn(4, 3, size, size, generator=generator), pictures]))
    for norm in norms:
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.05 * spread * torch.randn(spread.shape, generator=generator)
        norm.running_var *= 0.9 + 0.2 * torch.rand(spread.shape, generator=generator)
    return model.eval()


def _transformers_folder(family: str, folder: Path) -> tuple[str, None]:
    config: PreTrainedConfig = TRANSFORMERS[family]
    names = [f"class {index}" for index in range(_LABELS)]
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    model = randomise(AutoModelForImageClassification.from_config(config), _SIZE)
    model.save_pretrained(folder)
    square = {"height": _SIZE, "width": _SIZE}
    if family.startswith(("dinov2", "bit")):
        processor = BitImageProcessor(size={"shortest_edge": 80}, crop_size=square)
    elif family == "swin":
        processor = ViTImageProcessor(size=square)
    else:
        processor = ConvNextImageProcessor(size={"shortest_edge": _SIZE}, crop_pct=0.875)
    processor.save_pretrained(folder)
    return str(folder), None


def _checkpoint_file(create: Callable[..., nn.Module], source: str, folder: Path) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, name = source.partition(":")
    model = create(name, num_classes=_LABELS)
    if kind == "timm":
        size = model.pretrained_cfg["input_size"][-1]
    else:
        size = published_weights(name).transforms().crop_size[0]
    torch.save(randomise(model, size).state_dict(), folder / "weights.pth")
    return source, str(folder / "weights.pth")


def write_random_source(row: str, folder: Path) -> tuple[str, str | None]:
    """Write what a row converts.

    Args:
        row: one of `ROWS`.
        folder: new or empty.

    Returns:
        `source` and `checkpoint` of `load_source`.
    """
    kind, _, name = row.partition(":")
    torch.manual_seed(0)
    if kind == "transformers":
        return _transformers_folder(name, folder)
    if kind == "timm":
        return _checkpoint_file(timm.create_model, row, folder)
    if kind == "torchvision":
        return _checkpoint_file(torchvision.models.get_model, row, folder)
    return row, None
