"""Reading the folder of a CA-Stream model: all of it fits, or it is refused in one line."""

import hashlib
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig

from modeling_castream import CAStreamForImageClassification, CAStreamImageProcessor, CAStreamPatchImageProcessor

UNFIT = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_model(source: str | os.PathLike, **options) -> CAStreamForImageClassification:
    """The model in a folder or of a Hub id, in eval mode, with every weight from there.

    Args:
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: where there is none, files are missing or broken, or weights are missing, left over or of other
            shapes.
    """
    source = _expanded(source)
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if model_type not in ("castream", None):
            raise ValueError(f"it is a {model_type}, not a castream model; convert it first, with `castream convert`")
        model, info = CAStreamForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # safetensors, JSON and config errors have no common base
        raise ValueError(f"model {source} does not load: {_one_line(error)}") from error
    for kind in UNFIT:
        if info[kind]:
            names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])  # mismatched: with shapes
            raise ValueError(
                f"model {source} has weights that do not fit its config.json ({len(names)} {kind.replace('_', ' ')}: "
                f"{', '.join(names[:3])}): save the model again."
            )
    return model.eval()


def load_image_processor(source: str | os.PathLike) -> BaseImageProcessor:
    """The image processor in a folder or of a Hub id, by this package's class where it is one of ours.

    Raises:
        ValueError: where it does not load.
    """
    source = _expanded(source)
    try:
        saved, _ = BaseImageProcessor.get_image_processor_dict(source)
        # one of ours is saved as one that stands in for it where remote code may not run, to within a pixel of the crop
        name = str(saved.get("auto_map", {}).get("AutoImageProcessor")).rpartition(".")[2]
        ours = {one.__name__: one for one in (CAStreamImageProcessor, CAStreamPatchImageProcessor)}
        return ours.get(name, AutoImageProcessor).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the image processor of {source} does not load: {_one_line(error)}") from error


def fingerprint_model(model: torch.nn.Module) -> str:
    """A digest of a model's weights: the same model, and only that, may go on with an evaluation."""
    return _digest(sorted(model.state_dict().items()))


def fingerprint_folder(folder: Path) -> str | None:
    """`fingerprint_model` of the model that a folder holds, one tensor at a time. None where there are no weights."""
    with ExitStack() as stack:
        files = _files_by_tensor(folder, stack)
        tensors = ((name, file.get_tensor(name)) for name, file in sorted(files.items()))
        return _digest(tensors) if files else None


def count_values(folder: Path) -> tuple[int, int] | None:
    """Parameters and buffers in a folder: all, and the stream's. None where there are no weights."""
    with ExitStack() as stack:
        files = _files_by_tensor(folder, stack)
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name, file in files.items()}
    stream = sum(size for name, size in sizes.items() if ".stream." in f".{name}")
    return (sum(sizes.values()), stream) if sizes else None


def _files_by_tensor(folder: Path, stack: ExitStack) -> dict:
    """The open file of every tensor in a folder, by the tensor's name."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _expanded(source: str | os.PathLike) -> str:
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        raise ValueError(f"model {source} is a file: give its folder, {os.path.dirname(source) or '.'}.")
    return source


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
