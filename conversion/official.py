"""Checkpoints trained with the code of CA-Stream's authors (arXiv:2404.14996) as CA-Stream models.

Its networks are torchvision's with a token, `cls_token`, and a pooling in each block of the stream, whose only weights
are those of the linear map `to_out.1`. The streams read these places:

    resnet*_stream        after the max-pooling of the stem, and the four stages
    resnet*_final         the last stage
    convnext_*_stream     the stem, the first two downsampling layers, and the last stage
    efficientnet_*_stream the stem, the seven stages, and the head convolution
"""

from pathlib import Path

import torch
from castream.artifacts.files import check_free, new_folder
from transformers import BaseImageProcessor

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

from .checkpoint import read_checkpoint
from .mapping import STREAM, load_renamed, rename
from .preprocessing import labels
from .source import Rules
from .torchvision_sources import classifier_of, network_config, torchvision_processor, weight_rules

_RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
_CONVNEXTS = tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large"))
_EFFICIENTNETS = tuple(f"efficientnet_b{size}" for size in range(8))
ARCHITECTURES = (
    *(f"{name}_stream" for name in (*_RESNETS, *_CONVNEXTS, *_EFFICIENTNETS)),
    *(f"{name}_final" for name in _RESNETS),
)
_RESNET_BLOCKS = ("base", "l1", "l2", "l3", "l4")


def _stream_layers(network: str) -> list[str] | None:
    """Where a stream reads, for the networks in which that is not all stages."""
    if network in _CONVNEXTS:
        return [f"features.{layer}" for layer in (0, 2, 4, 7)]
    if network in _EFFICIENTNETS:
        return [f"features.{layer}" for layer in range(9)]
    return None


def _rules(network: str, variant: str, classifier: str) -> Rules:
    """Names of the weights."""
    rules: Rules = [
        (r"^cls_token$", f"{STREAM}query"),
        (r"^cls_stream\.(\d+)\.to_out\.1\.", rf"{STREAM}blocks.\1.projection."),
    ]
    if network.startswith("resnet"):
        blocks = ("cls_surrogate",) if variant == "final" else _RESNET_BLOCKS
        rules += [
            (rf"^{name}\.to_out\.1\.", f"{STREAM}blocks.{index}.projection.") for index, name in enumerate(blocks)
        ]
    return [*rules, *weight_rules(classifier)]


def _config(
    architecture: str, classifier: str, state: dict[str, torch.Tensor], num_attention_heads: int
) -> CAStreamConfig:
    network, _, variant = architecture.rpartition("_")
    if f"{classifier}.weight" not in state:
        raise ValueError(f"it has no {classifier}.weight")
    return CAStreamConfig(
        backbone_config=network_config(network),
        **labels(len(state[f"{classifier}.weight"])),
        variant=variant,
        stream_layers=_stream_layers(network),
        num_attention_heads=num_attention_heads,
        output_projection=variant == "stream" or "cls_surrogate.to_out.1.weight" in state,
        freeze_classifier=True,
    )


def convert_official(
    checkpoint: str | Path, architecture: str, *, num_attention_heads: int = 1
) -> tuple[CAStreamForImageClassification, BaseImageProcessor]:
    """Convert a checkpoint of the authors' code.

    Args:
        checkpoint: a state_dict or the `checkpoint.pth` of their training script, with or without the prefix `module.`.
        architecture: one of `ARCHITECTURES`.
        num_attention_heads: with how many heads it was trained, which the file does not say.

    Returns:
        The model in eval mode, with all but the stream frozen, and the image processor that torchvision publishes with
        its weights of the same network.

    Raises:
        ValueError: on a file that can't be read safely, or is not of that architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"--architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}.")
    state = read_checkpoint(checkpoint).state
    if "cls_token" not in state:
        raise ValueError(f"{checkpoint} has no cls_token: it is no CA-Stream checkpoint of the authors' code.")
    network, _, variant = architecture.rpartition("_")
    # Their ResNet-final calls the convolutions that torchvision calls conv1 by another name.
    state = {key.replace("confinal.", "conv1."): value for key, value in state.items()}
    classifier, _ = classifier_of(network_config(network))
    try:
        model = CAStreamForImageClassification(_config(architecture, classifier, state, num_attention_heads)).eval()
        rules = _rules(network, variant, classifier)
        load_renamed(model, state, rename(list(state), rules, set(model.state_dict())))
    except ValueError as error:
        raise ValueError(f"{checkpoint} does not fit {architecture}: {error}") from None
    return model, torchvision_processor(network)


def write_official(
    checkpoint: str | Path, architecture: str, output: str | Path, *, num_attention_heads: int = 1
) -> None:
    """Convert a checkpoint of the authors' code into a folder, new or empty; see `convert_official`."""
    check_free(output)
    with new_folder(Path(output).absolute()) as folder:
        model, image_processor = convert_official(checkpoint, architecture, num_attention_heads=num_attention_heads)
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
