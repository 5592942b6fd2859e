"""transformers classifiers: which layers stand around their pooling, and under which names."""

import os
import re
from functools import partial

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_castream.image_processing_castream import CAStreamPatchImageProcessor, join_patches
from modeling_castream.network_castream import HEADS, head_of, network_arguments

from .source import BACKBONE, CLASSIFIER, HEAD, NECK, Rules, Source
from .timm_sources import describe_wrapper

# Types whose backbone is an AutoBackbone: name of the last linear layer, and where weights go that neither do so nor
# keep their names. SwinBackbone and BitBackbone run, and store, the norm before pooling without handing its output on:
# its weights go to both places.
FAMILIES: dict[str, tuple[str, Rules]] = {
    "bit": ("classifier.1", [(r"^bit\.norm\.", (f"{NECK}0.", rf"{BACKBONE}\g<0>"))]),
    "convnext": ("classifier", [(r"^convnext\.layernorm\.", f"{HEAD}0.")]),
    "convnextv2": ("classifier", [(r"^convnextv2\.layernorm\.", f"{HEAD}0.")]),
    "dinov2": ("classifier", []),
    "dinov2_with_registers": ("classifier", []),
    "hgnet_v2": ("fc", []),
    "pp_lcnet": ("head", [(r"^last_convolution\.", f"{HEAD}0.")]),
    "resnet": ("classifier.1", []),
    "swin": ("classifier", [(r"^swin\.layernorm\.", (f"{NECK}0.", rf"{BACKBONE}\g<0>"))]),
}


def _layers(config: PreTrainedConfig) -> dict:
    """Fields of CAStreamConfig that it does not know by itself."""
    family = config.model_type
    if family in ("dinov2", "dinov2_with_registers"):
        return {"classifier_cls_token": True}
    if family == "pp_lcnet":
        wide = {"type": "linear", "out_channels": config.class_expand}
        return {"head_layers": [wide, {"type": "activation", "function": config.hidden_act}]}
    if family == "bit" and config.layer_type == "preactivation":
        norm = {"type": "group_norm", "num_groups": config.num_groups, "eps": 1e-5}
        return {"neck_layers": [norm, {"type": "activation", "function": config.hidden_act}]}
    return {} if family in FAMILIES else {"whole_classifier": True}


def _rules(config: PreTrainedConfig) -> Rules:
    """Names of the weights; a backbone's are the model's own, or those without the type before them."""
    family = config.model_type
    if family in FAMILIES:
        classifier, others = FAMILIES[family]
        places = [*others, (rf"^{family}\.", BACKBONE), (r"^", BACKBONE)]
    else:
        classifier, places = head_of(config).classifiers[0], [(r"^", f"{BACKBONE}network.")]
    return [(rf"^{re.escape(classifier)}\.", CLASSIFIER), *places]


def _adapt_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights as the converted model takes them: PP-LCNet's dropout scales in eval mode, too, what its head reads."""
    state = model.state_dict()
    if model.config.model_type == "pp_lcnet":
        state["head.weight"] = state["head.weight"] * (1 - model.config.hidden_dropout_prob)
    return state


SUPPORTED = ", ".join(sorted((*FAMILIES, *(family for family in HEADS if family.islower()), "timm_wrapper")))
_READERS = {  # what classifiers do that neither average nor read a vector beside a feature map
    "imagegpt": "it reads sequences of colours, not images",
    "perceiver": "it reads a learned query's output",
    "shieldgemma2": "it is a language model that answers yes or no",
}


def _check_family(source: str, config: PreTrainedConfig) -> None:
    family = config.model_type
    if reason := _READERS.get(family):
        raise ValueError(f"{source} ({family}) has no global average pooling of a feature map to replace: {reason}.")
    broken = {"dinat": "takes rows for heads, natten or not", "cvt": "asks for a CLS token in its last stage"}
    if family == "dinat" or (family == "cvt" and not config.cls_token[-1]):
        raise ValueError(f"{source} ({family}) does not run: transformers' network {broken[family]}.")
    if family not in (*FAMILIES, *HEADS, "timm_wrapper"):
        raise ValueError(f"{source} ({family}) is not supported. Supported transformers families: {SUPPORTED}.")


def _load_config(source: str) -> PreTrainedConfig:
    """Config of a folder or Hub id."""
    if not os.path.isdir(source) and (os.path.exists(source) or source.count("/") > 1 or source.startswith((".", "/"))):
        raise ValueError(f"no folder {source}: name the folder or Hub id of an image classifier.")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source} has no readable config: {_first_line(error)}") from None
    if getattr(config, "model_args", None):  # timm writes the number of classes twice, and transformers trips over it
        config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _load_model(source: str) -> PreTrainedModel:
    """The classifier of a folder or Hub id, in float32 and eval mode."""
    config = _load_config(source)
    _check_family(source, config)
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError: by where the file is damaged
        raise ValueError(f"the weights of {source} can't be loaded: {_first_line(error)}") from None
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            keys = sorted(info[problem])
            raise ValueError(f"{source} is not a whole classifier: {problem.replace('_', ' ')} {', '.join(keys[:3])}.")
    return model.eval()


def _load_processor(source: str):
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no readable preprocessor_config.json: {_first_line(error)}") from None


def load_transformers(source: str) -> Source:
    """Describe a transformers classifier.

    Args:
        source: folder or Hub id.

    Raises:
        ValueError: on a family that is not supported, or a folder without config, whole weights or image processor.
    """
    model = _load_model(source)
    if model.config.model_type == "timm_wrapper":
        return describe_wrapper(model, source)
    return describe_transformers(model, _load_processor(source))


def describe_transformers(model: PreTrainedModel, image_processor) -> Source:
    """Describe a transformers classifier in memory, with its image processor.

    Raises:
        ValueError: on a type that is not supported.
    """
    _check_family("the model", model.config)
    backbone = type(model.config)(**(model.config.to_dict() | {"id2label": None, "label2id": None}))
    backbone.architectures = [type(model).__name__]  # of several of its type it is that one
    if model.config.model_type in FAMILIES:
        backbone.out_features = list(backbone.stage_names)
    copied = {name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")}
    source = Source(
        family=f"transformers {model.config.model_type}",
        model=model,
        config={"backbone_config": backbone, **copied, **_layers(model.config)},
        rules=_rules(model.config),
        image_processor=image_processor,
        state=_adapt_state(model),
        transform=lambda images: torch.as_tensor(np.stack(image_processor(images=images)["pixel_values"])),
    )
    if model.config.model_type == "siglip2":  # its processor cuts images into patches
        processor = CAStreamPatchImageProcessor.from_dict(image_processor.to_dict())
        source.image_processor, source.arguments = processor, partial(network_arguments, model.config)
        source.transform = lambda images: torch.stack(join_patches(image_processor(images), processor.patch_size))
    return source
