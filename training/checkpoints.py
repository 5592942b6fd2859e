"""Checkpoints that can be trusted: whole or absent, verified by checksum, with the one before to fall back on."""

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from castream.artifacts.files import PARTIAL, new_folder, read_json, sha256, torch_bytes, write_file, write_json
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

MANIFEST, STATE = "manifest.json", "state.json"  # checksums of all other files; where the run stands
_PREFIX = "step-"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    optimizer: dict,
    state: dict,
    ranks: list[dict],
    keep: int,
) -> Path:
    """Write the checkpoint of an optimiser step, and remove all but the newest `keep`.

    Args:
        folder: of all checkpoints.
        tensors: the model's weights that training moves, `ema.` ones included.
        optimizer: state dictionary of the optimiser.
        state: JSON-able; where the run stands.
        ranks: one dictionary a process: its random states and its place in the data.

    Raises:
        OSError: where it cannot be written; the older ones are still there, and nothing of the new one is.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    with new_folder(final) as partial:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(partial / "model.safetensors", save_tensors(tensors))
        write_file(partial / "optimizer.pt", torch_bytes(optimizer))
        for rank, value in enumerate(ranks):
            write_file(partial / f"rank-{rank:05d}.pt", torch_bytes(value))
        write_json(partial / STATE, {"step": step, "state": state})
        write_json(partial / MANIFEST, {path.name: sha256(path) for path in sorted(partial.iterdir())})
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old.replace(old.with_name(old.name + PARTIAL)))  # killed halfway, it is no damaged checkpoint
    return final


def load_checkpoint(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest checkpoint that is intact.

    Returns:
        `tensors`, `optimizer`, `state`, `ranks` and `step` as they were saved, or None where there is none; and a line
        for each damaged checkpoint that was passed over.
    """
    notes = []
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path), notes
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"checkpoint {path.name} is damaged ({error}); using the one before")
    if notes:
        notes.append("no checkpoint is intact: beginning again")
    return None, notes


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())


def _read(path: Path) -> dict:
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds no checksums")
    for name, checksum in manifest.items():
        if sha256(path / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    names = sorted(name for name in manifest if name.startswith("rank-"))
    return read_json(path / STATE) | {
        "tensors": load_tensors((path / "model.safetensors").read_bytes()),
        "optimizer": torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        "ranks": [torch.load(path / name, map_location="cpu", weights_only=True) for name in names],
    }


def random_state() -> dict:
    """Random states of this process, as plain values that torch.load reads without running code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
    }


def restore_random_state(state: dict) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
