"""What a folder's safetensors files hold, read without building the model."""

import hashlib
import math
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def _tensors(folder: Path, stack: ExitStack) -> dict:
    """Name -> open file of every tensor."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def count_values(folder: Path) -> tuple[int, int] | None:
    """Parameters and buffers: all, and the stream's. None where there are no weights."""
    with ExitStack() as stack:
        tensors = _tensors(folder, stack)
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name, file in tensors.items()}
    stream = sum(size for name, size in sizes.items() if ".stream." in f".{name}")
    return (sum(sizes.values()), stream) if sizes else None


def fingerprint(folder: Path) -> str | None:
    """The digest by which an evaluation names the weights that it evaluated. None where there are no weights."""
    digest, found = hashlib.sha256(), False
    with ExitStack() as stack:
        for name, file in sorted(_tensors(folder, stack).items()):
            tensor, found = file.get_tensor(name), True
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if found else None
