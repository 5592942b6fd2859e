"""Reading weight files without running what is in them."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a `.safetensors` file, or of a PyTorch file.

    A PyTorch file holds a state_dict, or a dictionary with one under `state_dict` or `model`, such as the
    `checkpoint.pth` of PyTorch's ImageNet example. The prefix `module.` of a parallel wrapper is removed.

    Returns:
        Tensors by name, in the file's order.

    Raises:
        ValueError: on a file that is absent, damaged, needs pickle code to load, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError... by where a file is damaged
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise ValueError(
                f"{path} needs pickle code to load, which could do anything: convert its state_dict, saved alone."
            ) from None
        raise ValueError(f"{path} is not a readable checkpoint, damaged or cut off: {type(error).__name__}.") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state_dict but a {type(content).__name__}.")
    strangers = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise ValueError(f"{path} holds no state_dict: {strangers[0]!r} is not a tensor.")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_into(model: nn.Module, state: dict[str, torch.Tensor], checkpoint: str | Path, name: str) -> nn.Module:
    """Load weights strictly, and set eval mode.

    Raises:
        ValueError: where the weights of `checkpoint` are not those of the network `name`.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{checkpoint} does not fit {name}: {' '.join(lines)[:200]}") from None
    return model.eval()
