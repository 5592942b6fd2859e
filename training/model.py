"""The model as training finds it: converted, with a classifier for the dataset's classes, and what learns unfrozen."""

import copy
import json
from pathlib import Path

import torch
from castream.artifacts.files import new_folder, write_json
from castream.conversion import convert_classifier
from castream.data.opening import Split
from transformers import AutoImageProcessor

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, CAStreamImageProcessor

from .arguments import TrainingArguments
from .run_folder import RunFolder

TRAINING_FILE = "training.json"

_KEPT = ("neck_layers", "head_layers", "classifier_cls_token")  # what the conversion found out about the source


def starting_model(args: TrainingArguments, split: Split) -> tuple[CAStreamForImageClassification, object, bool]:
    """Load or convert `args.model` and give it the dataset's classes.

    Returns:
        The model, its image processor, and whether its classifier is still to be fitted.

    Raises:
        ValueError: on a source that cannot be had, or classes that do not fit; in one line.
    """
    source, image_processor = _load_source(args)
    names, available = split.class_names, source.config.num_labels
    keep = args.classifier == "keep" or (args.classifier == "auto" and (names is None or len(names) == available))
    if not keep and names is None:
        raise ValueError(f"classifier={args.classifier} needs a dataset that names its classes, and this one does not.")
    if keep and args.init == "gap" and _is_stream(args.model) and not _restructured(args, source.config):
        model = source
    else:
        model = _rebuild(source, args, None if keep else names)
    if split.multi_label:
        model.config.problem_type = "multi_label_classification"
    model.config.freeze_backbone, model.config.freeze_classifier = args.freeze_backbone, args.freeze_classifier
    return model, image_processor, not keep and args.classifier != "new"


def find_model(args: TrainingArguments, folder: RunFolder, split: Split) -> tuple:
    """What `starting_model` returns, from the run's folder where that has it already, trained or untrained."""
    for ready in (folder.model, folder.initial):
        if ready.is_dir():
            return *load_model(ready), False
    return starting_model(args, split)


def _load_source(args: TrainingArguments) -> tuple[CAStreamForImageClassification, object]:
    if _is_stream(args.model):
        return load_model(Path(args.model))
    try:
        return convert_classifier(args.model, checkpoint=args.model_checkpoint, variant=args.variant)
    except (OSError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model={args.model!r} cannot be loaded: {reason}") from error


def _is_stream(source: str) -> bool:
    """Whether a source is a folder with a CA-Stream model."""
    config = Path(source) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "castream"


def _restructured(args: TrainingArguments, config: CAStreamConfig) -> bool:
    """Whether the settings ask for another stream than a CA-Stream source has."""
    asked = (args.variant, args.query, args.num_attention_heads)
    layers = args.stream_layers is not None and list(args.stream_layers) != config.stream_layers
    return layers or asked != (config.variant, config.query, config.num_attention_heads)


def _rebuild(source: CAStreamForImageClassification, args: TrainingArguments, names: list[str] | None):
    """The same network with the stream that the settings describe, and with new classes where they are named."""
    old = source.config
    config = CAStreamConfig(
        backbone_config=copy.deepcopy(old.backbone_config),
        **{name: getattr(old, name) for name in _KEPT},
        id2label=old.id2label if names is None else dict(enumerate(names)),
        label2id=old.label2id if names is None else {name: index for index, name in enumerate(names)},
        variant=args.variant,
        stream_layers=None if args.stream_layers is None else list(args.stream_layers),
        num_attention_heads=args.num_attention_heads,
        query=args.query,
        init=args.init,
        freeze_backbone=args.freeze_backbone,
        freeze_classifier=args.freeze_classifier,
    )
    torch.manual_seed(args.seed)
    model = CAStreamForImageClassification(config)
    model.castream.backbone.load_state_dict(source.castream.backbone.state_dict())
    model.castream.neck.load_state_dict(source.castream.neck.state_dict())
    model.head.load_state_dict(source.head.state_dict())
    if names is None:
        model.classifier.load_state_dict(source.classifier.state_dict())
    return model.eval()


@torch.no_grad()
def set_classifier(model: CAStreamForImageClassification, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a model a fitted classifier."""
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)


def save_model(folder: Path, model: CAStreamForImageClassification, image_processor, facts: dict | None = None) -> None:
    """Write a folder that `from_pretrained` loads; whole or not at all.

    Args:
        facts: what else is known of the model, for TRAINING_FILE.

    Raises:
        OSError: where it cannot be written.
    """
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        image_processor.save_pretrained(partial)
        if facts is not None:
            write_json(partial / TRAINING_FILE, facts)


def load_model(folder: Path) -> tuple[CAStreamForImageClassification, object]:
    """A model and its image processor from a folder that `save_model` wrote."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    ours = "CAStreamImageProcessor" in str(settings.get("auto_map"))
    processor = (CAStreamImageProcessor if ours else AutoImageProcessor).from_pretrained(folder)
    return CAStreamForImageClassification.from_pretrained(folder), processor


def freeze(model: CAStreamForImageClassification, args: TrainingArguments) -> dict[str, torch.nn.Parameter]:
    """Unfreeze what the settings train, and nothing else.

    Returns:
        The parameters that learn, by name.
    """
    model.train()
    stream = model.castream.stream
    stream.requires_grad_(args.pooling == "ca")
    last = stream.blocks[-1].projection
    if args.freeze_output_projection:
        last.requires_grad_(False)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(parameters: dict[str, torch.nn.Parameter], weight_decay: float) -> list[dict]:
    """Weight decay for matrices; none for biases, norms and queries."""
    plain = [parameter for name, parameter in parameters.items() if parameter.ndim < 2 or name.endswith("stream.query")]
    decayed = [
        parameter for name, parameter in parameters.items() if parameter.ndim > 1 and not name.endswith("stream.query")
    ]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
