"""Reading weight files, as training leaves them, without running what is in them."""

import _codecs
import argparse
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

_SAFE = [  # what timm, torchvision and metrics leave in a file, and what only holds values
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,
    np._core.multiarray._reconstruct,
    _codecs.encode,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
]
_EMA = ("state_dict_ema", "model_ema", "ema_state_dict")
_PLAIN = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")  # of wrappers around the network
_LABELS = ("class_names", "classes", "labels", "label_names", "idx_to_class", "class_to_idx", "id2label")


@dataclass
class Checkpoint:
    """What a file holds.

    Args:
        state: weights by name, in the file's order, floats in float32.
        taken: under which key of the file they were, for people to read.
        labels: names of the classes, None where the file has none.
        arguments: of the training that wrote it, by name.
    """

    state: dict[str, torch.Tensor]
    taken: str = "the file's weights"
    labels: list[str] | None = None
    arguments: dict = field(default_factory=dict)


def _read(path: Path):
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError... by where a file is damaged
        if needed := re.search(r"unsupported (?:global|class):? *(?:GLOBAL )?([\w.]*)", str(error), re.IGNORECASE):
            raise ValueError(
                f"{path} needs pickle code to load ({needed[1]}), which could do anything: convert its state_dict, "
                "saved alone."
            ) from None
        raise ValueError(f"{path} is not a readable checkpoint, damaged or cut off: {type(error).__name__}.") from None


def _choose(content: dict, ema: bool | None, path: Path) -> tuple[dict, str]:
    """The weights among a file's entries, and their key."""
    averaged = [key for key in _EMA if isinstance(content.get(key), dict)]
    if ema and not averaged:
        raise ValueError(f"{path} has no EMA weights, only {', '.join(map(str, list(content)[:8]))}.")
    keys = [*(averaged if ema is not False else ()), *_PLAIN]
    for key in keys:
        if isinstance(content.get(key), dict):
            other = "; it has the raw weights, too" if key in _EMA else "; it has EMA weights, too" * bool(averaged)
            return content[key], f"{key}{other}"
    return content, "the file's weights"


def _without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the prefixes that all of them have."""
    while prefix := next((one for one in _PREFIXES if all(key.startswith(one) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _find_labels(content: dict) -> list[str] | None:
    for place in (content, content.get("hyper_parameters"), content.get("meta")):
        for key in _LABELS if isinstance(place, dict) else ():
            if isinstance(place.get(key), list | tuple):
                return [str(name) for name in place[key]]
            if isinstance(place.get(key), dict):
                pairs = place[key].items()
                if all(isinstance(value, int) for _, value in pairs):  # names -> ids
                    pairs = [(value, name) for name, value in pairs]
                return [str(name) for _, name in sorted((int(index), name) for index, name in pairs)]
    return None


def read_checkpoint(path: str | Path, ema: bool | None = None) -> Checkpoint:
    """Read a `.safetensors` file, or a PyTorch file: a state_dict, or a dictionary with one.

    timm's `model_best.pth.tar`, torchvision's reference checkpoints and Lightning's `.ckpt` are such dictionaries. The
    prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, `net.`, `backbone.`) are removed.

    Args:
        ema: whether to take the moving average of the weights; None: where there is one, as timm does.

    Raises:
        ValueError: on a file that is absent, damaged, needs pickle code to load, or holds no weights.
    """
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state_dict but a {type(content).__name__}.")
    state, taken = _choose(content, ema, path)
    strangers = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers or not state:
        has = f"{strangers[0]!r} is not a tensor" if strangers else "it is empty"
        raise ValueError(f"{path} holds no state_dict: {has}. It has {', '.join(map(str, list(content)[:8]))}.")
    state = {key: value for key, value in state.items() if key != "n_averaged"}  # of an averaged model's wrapper
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return Checkpoint(
        _without_prefixes(state), taken, _find_labels(content), arguments if isinstance(arguments, dict) else {}
    )


def read_labels(path: str | Path) -> list[str]:
    """Names of classes from a text file, one a line.

    Raises:
        ValueError: where the file can't be read.
    """
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels {path} can't be read as text: {error}.") from None


def plain_head(
    state: dict[str, torch.Tensor], classifier: str, head: str, checkpoint: str | Path
) -> dict[str, torch.Tensor]:
    """Weights with the classifier under its plain name, where the file has it behind dropout (`fc.1.weight`).

    Args:
        classifier: that name.
        head: of the module that holds the classifier and no other weights; itself where there are others.

    Raises:
        ValueError: where the head has several layers, whose activation no file tells.
    """
    if f"{classifier}.weight" in state:
        return state
    found = [key for key in state if re.fullmatch(rf"{re.escape(head)}\.(\w+\.)*weight", key)]
    if not found:
        raise ValueError(f"{checkpoint} has no {classifier}.weight. Its last weights: {', '.join(list(state)[-3:])}.")
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint} has a head of several layers ({', '.join(found)}), and a file does not tell what lies "
            "between them: heads of dropout and one linear layer convert."
        )
    prefix = found[0].removesuffix("weight")
    return {re.sub(rf"^{re.escape(prefix)}", f"{classifier}.", key): value for key, value in state.items()}


def load_into(model: nn.Module, state: dict[str, torch.Tensor], checkpoint: str | Path, name: str) -> nn.Module:
    """Load weights strictly, and set eval mode.

    Raises:
        ValueError: where the weights of `checkpoint` are not those of the network `name`.
    """
    state = OrderedDict(state)
    state._metadata = {"": {"version": model._version}}  # MNASNet asks for it, and a file's is gone
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{checkpoint} does not fit {name}: {' '.join(lines)[:200]}") from None
    return model.eval()
