"""torchvision classifiers: by name, with the weights that torchvision publishes or with those of a file."""

import re
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from modeling_castream.configuration_castream import TorchvisionConfig
from modeling_castream.torchvision_castream import create_network, split_at_pooling

from .checkpoint import Checkpoint, load_into, plain_head, read_checkpoint
from .preprocessing import image_processor, labels
from .source import BACKBONE, CLASSIFIER, Rules, Source

_INCEPTIONS = ("googlenet", "inception_v3")
_AUXILIARY = re.compile(r"^(aux\d|AuxLogits)\.")  # heads of theirs that only training runs


def network_config(name: str, transform_input: bool = True) -> TorchvisionConfig:
    """The config of one of torchvision's networks.

    Args:
        transform_input: whether an Inception network undoes ImageNet's normalisation and applies its own, as those do
            that start from published weights.
    """
    options = {"aux_logits": False, "init_weights": False, "transform_input": transform_input}
    size = published_weights(name).transforms().crop_size[0]
    return TorchvisionConfig(name=name, options=options if name in _INCEPTIONS else None, image_size=size)


def classifier_of(config: TorchvisionConfig) -> tuple[str, list[str]]:
    """Name of a network's last linear layer, and names of the other weights of its head.

    Raises:
        ValueError: on a network that does not average a feature map.
    """
    with torch.device("meta"):
        _, head, classifier = split_at_pooling(create_network(config, 1000))
    return classifier, [name for name in head.state_dict() if not name.startswith(f"{classifier}.")]


def weight_rules(classifier: str) -> Rules:
    """Names of a torchvision network's weights in its CA-Stream model."""
    inside = [(r"^", f"{BACKBONE}{part}.") for part in ("body", "head")]
    return [*inside, (rf"^{re.escape(classifier)}\.", CLASSIFIER)]


def published_weights(name: str, checkpoint: str | Path | None = None):
    """The entry of torchvision's list of weights that a file's name says it is, else the first."""
    weights = list(models.get_model_weights(name))
    file_name = None if checkpoint is None else Path(checkpoint).name
    return next((entry for entry in weights if Path(entry.url).name == file_name), weights[0])


def torchvision_processor(name: str, checkpoint: str | Path | None = None):
    """The image processor that gives the pixels of the transform that torchvision publishes with the weights."""
    preset = published_weights(name, checkpoint).transforms()
    crop = preset.crop_size * 2 if len(preset.crop_size) == 1 else preset.crop_size
    return image_processor(preset.resize_size, crop, preset.interpolation.value, preset.mean, preset.std)


def _download(name: str) -> tuple[Checkpoint, str]:
    """torchvision's latest weights of a network, and their address."""
    weights = list(models.get_model_weights(name))[-1]
    try:
        return Checkpoint(dict(weights.get_state_dict(check_hash=True))), weights.url
    except Exception as error:  # whatever the network makes of it
        raise ValueError(
            f"the weights of torchvision:{name} could not be downloaded ({error}): name a file with --checkpoint FILE."
        ) from None


def _of_today(name: str) -> str:
    """A DenseNet's weight as torchvision names it since 2018 (`norm1`): its published files are older (`norm.1`)."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)


def _build(
    config: TorchvisionConfig, classifier: tuple[str, list[str]], found: Checkpoint, checkpoint: str | Path
) -> nn.Module:
    """The network with a file's weights, in eval mode."""
    name, others = classifier
    state = {_of_today(key): value for key, value in found.state.items() if not _AUXILIARY.match(key)}
    state = plain_head(state, name, name if others else name.split(".")[0], checkpoint)
    model = create_network(config, len(state[f"{name}.weight"]))
    return load_into(model, state, checkpoint, config.name)


def load_torchvision(name: str, checkpoint: str | Path | None = None, ema: bool | None = None) -> Source:
    """Describe a torchvision classifier.

    Args:
        name: torchvision's, e.g. `"resnet50"`.
        checkpoint: file with its weights; None: torchvision's latest weights, downloaded.
        ema: see `read_checkpoint`.

    Raises:
        ValueError: on a network that does not average a feature map, or weights that can't be had or do not fit.
    """
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}. It has {', '.join(known)}.")
    try:
        classifier = classifier_of(network_config(name))
    except ValueError as error:
        raise ValueError(f"torchvision:{name}: {error}") from None
    found, checkpoint = _download(name) if checkpoint is None else (read_checkpoint(checkpoint, ema), checkpoint)
    if (said := found.arguments.get("model", name)) != name:
        raise ValueError(f"{checkpoint} is of {said}, not of {name}: use --source torchvision:{said}.")
    from_scratch = "weights" in found.arguments and not found.arguments["weights"]
    config = network_config(name, transform_input=not from_scratch)
    if name in _INCEPTIONS and not from_scratch:
        found.taken += "; transform_input is True, as for published weights"
    model = _build(config, classifier, found, checkpoint)
    transform = published_weights(name, checkpoint).transforms()
    return Source(
        family=f"torchvision {type(model).__name__}",
        model=model,
        config={"backbone_config": config, **labels(len(model.get_submodule(classifier[0]).weight), found.labels)},
        rules=weight_rules(classifier[0]),
        image_processor=torchvision_processor(name, checkpoint),
        transform=lambda images: torch.stack([transform(image) for image in images]),
        taken=found.taken,
    )
