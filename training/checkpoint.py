"""Checkpoints that can be trusted: whole or absent, verified by checksum, with the one before to fall back on.

accelerate's save_state writes its files one by one under their final names, without checksums, and knows nothing of a
place in the data; what is here makes a resumed run the uninterrupted one, to the last bit.
"""

import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
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
        tensors: the model's weights that training changes, `ema.` ones included.
        optimizer: state dictionary of the optimiser.
        state: JSON-able; where the run stands.
        ranks: one dictionary per process: its random states and its place in the data.

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
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old.replace(old.with_name(old.name + PARTIAL)))  # killed halfway, it is no damaged checkpoint
    return final


def load_checkpoint(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest checkpoint that is intact.

    Returns:
        `tensors`, `optimizer`, `state`, `ranks` and `step` as they were saved, or None where there is none; and a line
        for each damaged checkpoint that was passed over.
    """
    notes = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path), notes
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"checkpoint {path.name} is damaged ({error}); using the one before")
    if notes:
        notes.append("no checkpoint is intact: beginning again")
    return None, notes


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())


def read_checkpoint(path: Path) -> dict:
    """A checkpoint as `load_checkpoint` returns it.

    Raises:
        OSError, ValueError, KeyError: where it is damaged.
    """
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


@dataclass
class Progress:
    """Counters of a run, over all processes.

    Args:
        epoch, step: epochs and optimiser steps that are done.
        images: images that were trained on; rows: rows that were read; bad: those that did not decode.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    rows: int = 0
    bad: int = 0


class Checkpointer:
    """Saves and restores everything that a run changes.

    Args:
        folder: of all checkpoints.
        keep: how many of them.
        layout: what a place in the data depends on: processes, readers, batch size. With another one a run goes on
            at the next epoch.
        weights: tensors that training changes, by name; averages: of weights, by name.
        optimizer: prepared by the accelerator.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep: int,
        layout: dict,
        *,
        weights: dict[str, torch.Tensor],
        averages: dict[str, torch.Tensor],
        optimizer,
    ):
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        self.tensors = dict(weights) | {f"ema.{name}": value for name, value in averages.items()}
        self.optimizer, self.layout = optimizer, layout

    def save(self, progress: Progress, place: dict | None) -> None:
        """Write a checkpoint.

        Args:
            place: of this process in the data of the epoch under way.

        Raises:
            OSError: where it cannot be written.
        """
        ranks = gather_object([{"random": random_state(), "place": place}])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            state = {"progress": asdict(progress), "layout": self.layout}
            save_checkpoint(self.folder, progress.step, self.tensors, optimizer, state, ranks, self.keep)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[Progress, dict | None]:
        """Restore the newest intact checkpoint, if there is one.

        Returns:
            Where the run stands, and this process's place in the data of its epoch (None: the epoch's start).
        """
        found = [load_checkpoint(self.folder) if self.accelerator.is_main_process else None]
        checkpoint, notes = broadcast_object_list(found)[0]
        for note in notes:
            self.accelerator.print(note)
        if checkpoint is None:
            return Progress(), None
        self._restore(checkpoint)
        progress = Progress(**checkpoint["state"]["progress"])
        if checkpoint["state"]["layout"] == self.layout:
            rank = checkpoint["ranks"][self.accelerator.process_index]
            restore_random_state(rank["random"])
            self.accelerator.print(f"going on after step {progress.step}, in epoch {progress.epoch + 1}, exactly there")
            return progress, rank["place"]
        started = any(rank["place"] is not None for rank in checkpoint["ranks"])
        progress.epoch += started
        self.accelerator.print(
            f"going on after step {progress.step} at the start of epoch {progress.epoch + 1}: processes, workers or "
            "batch size have changed" + (", so the rest of the epoch before is left out" if started else "")
        )
        return progress, None

    @torch.no_grad()
    def _restore(self, checkpoint: dict) -> None:
        saved = checkpoint["tensors"]
        for name, tensor in self.tensors.items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint in {self.folder.parent} belongs to another model: {name} differs; choose another "
                    "output_dir."
                )
            tensor.copy_(saved[name])
        self.optimizer.load_state_dict(checkpoint["optimizer"]["optimizer"])
        if self.accelerator.scaler and checkpoint["optimizer"]["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["optimizer"]["scaler"])
