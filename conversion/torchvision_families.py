"""torchvision classifiers, and the names that the weights of torchvision's networks take in a CA-Stream model."""

import re
from pathlib import Path

import torch
import torchvision
from transformers import ConvNextConfig, ResNetConfig, TimmBackboneConfig

from .checkpoint import Checkpoint, load_into, plain_head, read_checkpoint
from .preprocessing import image_processor, labels
from .source import BACKBONE, CLASSIFIER, HEAD, NECK, TIMM_BACKBONE, Rules, Source

_RESNETS = {  # depths, kind of block, widths
    "resnet18": ([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "resnet34": ([3, 4, 6, 3], "basic", [64, 128, 256, 512]),
    "resnet50": ([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "resnet101": ([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048]),
    "resnet152": ([3, 8, 36, 3], "bottleneck", [256, 512, 1024, 2048]),
}
_CONVNEXTS = {  # depths, widths
    "convnext_tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "convnext_small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "convnext_base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "convnext_large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
}
_EFFICIENTNETS = {  # channels after the head convolution, epsilon of batch normalisation
    "efficientnet_b0": (1280, 1e-5),
    "efficientnet_b1": (1280, 1e-5),
    "efficientnet_b2": (1408, 1e-5),
    "efficientnet_b3": (1536, 1e-5),
    "efficientnet_b4": (1792, 1e-5),
    "efficientnet_b5": (2048, 1e-3),
    "efficientnet_b6": (2304, 1e-3),
    "efficientnet_b7": (2560, 1e-3),
}
_CLASSIFIERS = {"resnet": "fc.weight", "convnext": "classifier.2.weight", "efficientnet": "classifier.1.weight"}
_TIMM_EPS = 1e-5  # of timm's efficientnet_b0..b7
ARCHITECTURES = (*_RESNETS, *_CONVNEXTS, *_EFFICIENTNETS)
_WITHOUT_POOLING = {
    "alexnet": "its classifier reads every position of the last feature map with weights of its own",
    "vgg": "its classifier reads every position of the last feature map with weights of its own",
    "vit": "its classifier reads the CLS token",
}

_RESNET_RULES: Rules = [
    (r"^fc\.", CLASSIFIER),
    (r"^conv1\.", f"{BACKBONE}embedder.embedder.convolution."),
    (r"^bn1\.", f"{BACKBONE}embedder.embedder.normalization."),
    *[
        (rf"^layer{stage + 1}\.(\d+)\.{name}\.", rf"{BACKBONE}encoder.stages.{stage}.layers.\1.{part}.")
        for stage in range(4)
        for name, part in (
            *((f"conv{layer + 1}", f"layer.{layer}.convolution") for layer in range(3)),
            *((f"bn{layer + 1}", f"layer.{layer}.normalization") for layer in range(3)),
            (r"downsample\.0", "shortcut.convolution"),
            (r"downsample\.1", "shortcut.normalization"),
        )
    ],
]
_CONVNEXT_RULES: Rules = [
    (r"^classifier\.0\.", f"{HEAD}0."),
    (r"^classifier\.2\.", CLASSIFIER),
    (r"^features\.0\.0\.", f"{BACKBONE}embeddings.patch_embeddings."),
    (r"^features\.0\.1\.", f"{BACKBONE}embeddings.layernorm."),
    *[
        (rf"^features\.{2 * stage + 1}\.(\d+)\.{name}", rf"{BACKBONE}encoder.stages.{stage}.layers.\1.{part}")
        for stage in range(4)
        for name, part in (
            ("layer_scale", "layer_scale_parameter"),
            (r"block\.0\.", "dwconv."),
            (r"block\.2\.", "layernorm."),
            (r"block\.3\.", "pwconv1."),
            (r"block\.5\.", "pwconv2."),
        )
    ],
    *[(rf"^features\.{2 * stage}\.", f"{BACKBONE}encoder.stages.{stage}.downsampling_layer.") for stage in (1, 2, 3)],
]
_FIRST_STAGE = (  # its blocks do not expand
    *(("0.0", "conv_dw"), ("0.1", "bn1"), ("1.fc1", "se.conv_reduce"), ("1.fc2", "se.conv_expand")),
    *(("2.0", "conv_pw"), ("2.1", "bn2")),
)
_OTHER_STAGES = (
    *(("0.0", "conv_pw"), ("0.1", "bn1"), ("1.0", "conv_dw"), ("1.1", "bn2")),
    *(("2.fc1", "se.conv_reduce"), ("2.fc2", "se.conv_expand"), ("3.0", "conv_pwl"), ("3.1", "bn3")),
)
_EFFICIENTNET_RULES: Rules = [
    (r"^classifier\.1\.", CLASSIFIER),
    (r"^features\.0\.0\.", f"{TIMM_BACKBONE}conv_stem."),
    (r"^features\.0\.1\.", f"{TIMM_BACKBONE}bn1."),
    (r"^features\.8\.0\.", f"{NECK}0."),
    (r"^features\.8\.1\.", f"{NECK}1."),
    *[
        (rf"^features\.{stage + 1}\.(\d+)\.block\.{re.escape(name)}\.", rf"{TIMM_BACKBONE}blocks.{stage}.\1.{part}.")
        for stage in range(7)
        for name, part in (_OTHER_STAGES if stage else _FIRST_STAGE)
    ],
]


def describe(name: str) -> tuple[dict, Rules]:
    """Describe the CA-Stream counterpart of one of `ARCHITECTURES`: fields of CAStreamConfig, and names of weights."""
    if name in _RESNETS:
        depths, block, widths = _RESNETS[name]
        backbone = ResNetConfig(embedding_size=64, depths=depths, layer_type=block, hidden_sizes=widths)
        backbone.out_features = list(backbone.stage_names)
        return {"backbone_config": backbone}, _RESNET_RULES
    if name in _CONVNEXTS:
        depths, widths = _CONVNEXTS[name]
        backbone = ConvNextConfig(depths=depths, hidden_sizes=widths, layer_norm_eps=1e-6)
        backbone.out_features = list(backbone.stage_names)
        return {"backbone_config": backbone}, _CONVNEXT_RULES
    channels, eps = _EFFICIENTNETS[name]
    neck = [
        {"type": "conv", "out_channels": channels},
        {"type": "batch_norm", "eps": eps},
        {"type": "activation", "function": "silu"},
    ]
    backbone = TimmBackboneConfig(backbone=name, out_indices=list(range(5)))
    return {"backbone_config": backbone, "neck_layers": neck}, _EFFICIENTNET_RULES


def num_classes(name: str, state: dict[str, torch.Tensor]) -> int:
    """Outputs of the classifier in the weights of one of `ARCHITECTURES`.

    Raises:
        ValueError: where there is none under the name it has in that network.
    """
    key = _CLASSIFIERS[name.split("_")[0].rstrip("0123456789")]
    if key not in state:
        raise ValueError(f"it has no {key}")
    return len(state[key])


def adapt_state(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of one of `ARCHITECTURES` in the form its counterpart takes.

    The larger EfficientNets normalise with an epsilon that timm's networks of the same name do not have. The difference
    moves into the running variance, so that (x - mean) / sqrt(variance + eps) stays what it was.
    """
    eps = _EFFICIENTNETS[name][1] if name in _EFFICIENTNETS else _TIMM_EPS
    in_backbone = re.compile(r"^features\.[0-7]\..*running_var$")
    return {key: value + (eps - _TIMM_EPS) if in_backbone.match(key) else value for key, value in state.items()}


def published_weights(name: str, checkpoint: str | Path | None = None):
    """The entry of torchvision's list of weights that a file's name says it is, else the first."""
    weights = list(torchvision.models.get_model_weights(name))
    file_name = None if checkpoint is None else Path(checkpoint).name
    return next((entry for entry in weights if Path(entry.url).name == file_name), weights[0])


def torchvision_processor(name: str, checkpoint: str | Path | None = None):
    """The image processor that gives the pixels of the transform that torchvision publishes with the weights."""
    preset = published_weights(name, checkpoint).transforms()
    crop = preset.crop_size * 2 if len(preset.crop_size) == 1 else preset.crop_size
    return image_processor(preset.resize_size, crop, preset.interpolation.value, preset.mean, preset.std)


def _classifier(name: str) -> str:
    """Where a network has its classifier."""
    return _CLASSIFIERS[name.split("_")[0].rstrip("0123456789")].removesuffix(".weight")


def _from_checkpoint(name: str, checkpoint: str | Path, ema: bool | None) -> tuple[torch.nn.Module, Checkpoint]:
    found = read_checkpoint(checkpoint, ema)
    said = found.arguments.get("model", name)
    if said != name:
        raise ValueError(f"{checkpoint} is of {said}, not of {name}: use --source torchvision:{said}.")
    state = plain_head(found.state, _classifier(name), checkpoint)
    try:
        model = torchvision.models.get_model(name, num_classes=num_classes(name, state))
    except ValueError as error:
        raise ValueError(f"{checkpoint} does not fit {name}: {error}.") from None
    return load_into(model, state, checkpoint, name), found


def _download(name: str, weights) -> torch.nn.Module:
    try:
        return torchvision.models.get_model(name, weights=weights).eval()
    except Exception as error:  # whatever the network makes of it
        raise ValueError(
            f"the weights of torchvision:{name} could not be downloaded ({error}): name a file with --checkpoint FILE."
        ) from None


def load_torchvision(name: str, checkpoint: str | Path | None = None, ema: bool | None = None) -> Source:
    """Describe a torchvision classifier.

    Args:
        name: one of `ARCHITECTURES`.
        checkpoint: file with its weights; None: torchvision's latest weights, downloaded.
        ema: see `read_checkpoint`.

    Raises:
        ValueError: on a network that is not supported, or weights that can't be had or do not fit.
    """
    for family, reason in _WITHOUT_POOLING.items():
        if name.startswith(family):
            raise ValueError(f"torchvision:{name} has no global average pooling to replace: {reason}.")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"torchvision:{name} is not supported. Supported: {', '.join(ARCHITECTURES)}. "
            "timm: has more, many of them under torchvision's names of weights."
        )
    if checkpoint is None:
        weights = list(torchvision.models.get_model_weights(name))[-1]
        model, checkpoint, found = _download(name, weights), weights.url, Checkpoint({})
    else:
        model, found = _from_checkpoint(name, checkpoint, ema)
    config, rules = describe(name)
    transform = published_weights(name, checkpoint).transforms()
    return Source(
        family=f"torchvision {name.rstrip('0123456789').split('_')[0]}",
        model=model,
        config={**config, **labels(num_classes(name, model.state_dict()), found.labels)},
        rules=rules,
        image_processor=torchvision_processor(name, checkpoint),
        transform=lambda images: torch.stack([transform(image) for image in images]),
        state=adapt_state(name, model.state_dict()),
        taken=found.taken,
    )
