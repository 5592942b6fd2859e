"""Small classifiers of every kind with random weights, for the tests and the coverage's table."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from castream.conversion.parity import example_images
from castream.conversion.torchvision_sources import published_weights
from torch import nn
from transformers import (
    AutoConfig,
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
    Siglip2ImageProcessor,
    SwinConfig,
    ViTImageProcessor,
)

_LABELS = 7
_SIZE = 64
_VIT = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_VIT |= {"intermediate_size": 48}
_PYRAMID = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
_SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 2, 4], "window_size": 4}
_PVT = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
_WHOLE = {
    "beit": _VIT,
    "clip": {"vision_config": _VIT},
    "beit, CLS token": {**_VIT, "use_mean_pooling": False},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "data2vec-vision": _VIT,
    "data2vec-vision, CLS token": {**_VIT, "use_mean_pooling": False},
    "deit": {**_VIT, "architectures": ["DeiTForImageClassification"]},
    "deit, with teacher": {**_VIT, "architectures": ["DeiTForImageClassificationWithTeacher"]},
    "donut-swin": _SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"image_size": 64, "embed_dim": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "hiera": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    "ijepa": _VIT,
    "levit": {
        **{"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1]},
        **{"key_dim": [8, 8, 8], "architectures": ["LevitForImageClassification"]},
    },
    "levit, with teacher": {
        **{"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1]},
        **{"key_dim": [8, 8, 8], "architectures": ["LevitForImageClassificationWithTeacher"]},
    },
    "metaclip_2": {"vision_config": _VIT},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {
        **{"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48]},
    },
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64},
    "poolformer": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "pvt": {**_PVT, "num_labels": _LABELS},  # a field of its own there
    "pvt_v2": _PVT,
    "regnet": {"embedding_size": 8, **_PYRAMID, "groups_width": 8},
    "segformer": _PVT,
    "siglip": {"vision_config": _VIT},
    "siglip2": {"vision_config": {key: _VIT[key] for key in _VIT if key != "image_size"} | {"num_patches": 16}},
    "swiftformer": {"image_size": 64, "embed_dims": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "swinv2": _SWIN,
    "textnet": {},
    "hgnet_v2": {
        **{"stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 24, 32], "stage_mid_channels": [8, 8, 8, 8]},
        **{"stage_out_channels": [16, 24, 32, 48], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4},
        **{"hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4},
    },
    "pp_lcnet": {"scale": 0.25, "class_expand": 64},
    "vit": _VIT,
    "vit_msn": _VIT,
}
_GAINS = {"efficientnet": 12.0, "mobilevit": 24.0}  # of the weights, where swish and gates swallow more of the signal
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
    **{family: AutoConfig.for_model(family.split(",")[0], **options) for family, options in _WHOLE.items()},
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
TORCHVISION = (
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "swin_t",
    "swin_v2_t",
)
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
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if not norms:
        return model.eval()
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


@torch.no_grad()
def _spread(model: nn.Module, gain: float) -> nn.Module:
    """Scale matrices to keep a signal's size: transformers' first weights are so small that deep networks are dead."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() > 0:
            parameter *= gain / (parameter.std() * parameter[0].numel() ** 0.5)
    return model


def _transformers_folder(family: str, folder: Path) -> tuple[str, None]:
    config: PreTrainedConfig = TRANSFORMERS[family]
    names = [f"class {index}" for index in range(_LABELS)]
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    model = AutoModelForImageClassification.from_config(config)
    model = randomise(_spread(model, _GAINS.get(family, 1.5)) if family in _WHOLE else model, _SIZE)
    model.save_pretrained(folder)
    square = {"height": _SIZE, "width": _SIZE}
    if family.startswith(("dinov2", "bit")):
        processor = BitImageProcessor(size={"shortest_edge": 80}, crop_size=square)
    elif family == "siglip2":
        processor = Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    elif family == "swin" or family in _WHOLE:
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
