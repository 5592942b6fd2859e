"""Where a run stands, and how it is kept: the state between checkpoints and the files."""

from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from .arguments import TrainingArguments
from .checkpoints import load_checkpoint, random_state, restore_random_state, save_checkpoint
from .ema import Ema
from .run_folder import RunFolder


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


class Keeper:
    """Saves and restores everything that a run changes.

    Args:
        weights: tensors that training moves, by name.
        optimizer: prepared by the accelerator.
        layout: what a place in the data depends on: processes, readers, batch size. With another one a run goes on
            at the next epoch.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        folder: RunFolder,
        weights: dict[str, torch.Tensor],
        optimizer,
        ema: Ema | None,
        layout: dict,
    ):
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.weights, self.optimizer, self.ema, self.layout = weights, optimizer, ema, layout

    def save(self, progress: Progress, place: dict | None) -> None:
        """Write a checkpoint.

        Args:
            place: of this process in the data of the epoch under way.

        Raises:
            OSError: where it cannot be written.
        """
        ranks = gather_object([{"random": random_state(), "place": place}])
        if self.accelerator.is_main_process:
            averages = self.ema.averages if self.ema else {}
            tensors = dict(self.weights) | {f"ema.{name}": value for name, value in averages.items()}
            scaler = self.accelerator.scaler
            optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            state = {"progress": asdict(progress), "layout": self.layout}
            checkpoints = self.folder.checkpoints
            save_checkpoint(checkpoints, progress.step, tensors, optimizer, state, ranks, self.args.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[Progress, dict | None]:
        """Restore the newest intact checkpoint, if there is one.

        Returns:
            Where the run stands, and this process's place in the data of its epoch (None: the epoch's start).
        """
        found = [load_checkpoint(self.folder.checkpoints) if self.accelerator.is_main_process else None]
        checkpoint, notes = broadcast_object_list(found)[0]
        for note in notes:
            self.accelerator.print(note)
        if checkpoint is None:
            return Progress(), None
        progress = Progress(**checkpoint["state"]["progress"])
        self._restore(checkpoint)
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
        tensors = checkpoint["tensors"]
        for name, weight in self.weights.items():
            if name not in tensors or tensors[name].shape != weight.shape:
                raise ValueError(
                    f"the checkpoint in {self.folder.path} belongs to another model: {name} differs; choose another "
                    "output_dir."
                )
            weight.copy_(tensors[name])
        if self.ema:
            for name, average in self.ema.averages.items():
                average.copy_(tensors[f"ema.{name}"])
        self.optimizer.load_state_dict(checkpoint["optimizer"]["optimizer"])
        if self.accelerator.scaler and checkpoint["optimizer"]["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["optimizer"]["scaler"])
