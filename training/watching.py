"""What a run shows while it goes: the progress bar, the log, and the checks that stop it."""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from .arguments import TrainingArguments
from .progress import Progress
from .run_folder import RunFolder
from .steps import total
from .strip import STRIP_IMAGES, draw_strip

MIN_ROWS = 200  # rows before the share of bad ones means anything


class Watch:
    """Rank zero's progress bar and the tracker's log.

    Args:
        layers: names of the stream's blocks, for the entropy of their attention.
        images: of all epochs; with `max_steps`, the bar ends where these do.
        progress: where the run stands at the start.
    """

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, layers: list[str], images: int, progress: Progress
    ):
        self.args, self.accelerator, self.layers = args, accelerator, layers
        self.supervised = args.objective == "cross_entropy"
        self.sums, self.images, self.since = {}, 0, time.time()
        main = accelerator.is_main_process
        step_images = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        images = min(images, args.max_steps * step_images) if args.max_steps else images
        self.bar = tqdm(total=images, initial=progress.images, unit="img", desc="training", disable=not main)

    def step(self, progress: Progress, sums: dict[str, torch.Tensor], images: int, rate: float) -> None:
        """Take in an optimiser step; every `log_steps`, log the means since the last time."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.images += images
        self.bar.update(images)
        if progress.step % self.args.log_steps:
            return
        values = [*self.sums["entropy"].tolist(), self.sums["loss"].item(), self.sums["correct"].item()]
        *entropies, loss, correct = [value / self.images for value in total(self.accelerator, values)]
        speed = self.images / (time.time() - self.since)
        entry = {"loss": loss, "learning_rate": rate, "images_per_second": speed, "epoch": progress.epoch}
        entry |= {f"attention_entropy/{name}": value for name, value in zip(self.layers, entropies, strict=True)}
        if self.supervised:
            entry["accuracy"] = correct
        self.accelerator.log(entry, step=progress.step)
        self.bar.set_postfix(loss=f"{loss:.3f}", entropy=f"{entropies[-1]:.3f}", refresh=False)
        self.sums, self.images, self.since = {}, 0, time.time()

    def strip(self, progress: Progress, objective, images: list[torch.Tensor]) -> None:
        """Every `strip_steps`, log what the model looks at on the first images of normalised batches."""
        if not self.args.strip_steps or progress.step % self.args.strip_steps or not images:
            return
        if self.accelerator.is_main_process:
            picture = draw_strip(objective, images[0][:STRIP_IMAGES])
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image("saliency", picture, progress.step, dataformats="HWC")
                elif tracker.name == "trackio":
                    import trackio  # installed, since it is the tracker

                    tracker.tracker.log({"saliency": trackio.Image(picture)}, step=progress.step)
                elif tracker.name == "wandb":
                    tracker.log_images({"saliency": [picture]}, step=progress.step)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()


def check_loss(sums: dict[str, torch.Tensor], progress: Progress, rate: float, batches: list[dict]) -> None:
    """Stop before a loss that is not a number spoils the weights.

    Raises:
        ValueError: naming the step, the learning rate and the images of this process.
    """
    loss = sums["loss"].item()
    if loss == loss and abs(loss) != float("inf"):
        return
    keys = [key for batch in batches for key in batch["keys"]]
    listed = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise ValueError(
        f"the loss is {loss} at step {progress.step + 1} with learning rate {rate:.3g}, on the images {listed}: lower "
        "learning_rate or raise warmup; the last checkpoint is from before."
    )


def check_weights(weights: dict[str, torch.Tensor], progress: Progress, rate: float) -> None:
    """Keep weights that are not numbers out of every checkpoint and model: a loss may be finite once more.

    Raises:
        ValueError: naming the weight, the step and the learning rate.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(
                f"{name} is no longer finite after step {progress.step} with learning rate {rate:.3g}: lower "
                "learning_rate or raise warmup; the last checkpoint is from before."
            )


def check_readable(images: int) -> None:
    """Stop where there is nothing to train on.

    Raises:
        ValueError: where not a single image could be decoded.
    """
    if not images:
        raise ValueError("not one image of the training split could be decoded: see bad_images.txt.")


def note_bad_images(args: TrainingArguments, accelerator: Accelerator, folder: RunFolder, progress, loader) -> None:
    """Count and list the images that did not decode since the last time, over all processes.

    Raises:
        ValueError: where there have been more of them than `max_bad_fraction`.
    """
    keys = gather_object(loader.bad) if accelerator.num_processes > 1 else loader.bad
    loader.bad = []
    if accelerator.is_main_process:
        folder.note_bad_images(keys)
    progress.bad += len(keys)
    if progress.rows > MIN_ROWS:
        check_bad_images(args, folder, progress.bad, progress.rows)


def check_bad_images(args: TrainingArguments, folder: RunFolder, bad: int, rows: int) -> None:
    """Stop where too many images did not decode.

    Raises:
        ValueError: naming the numbers and the list.
    """
    if bad > args.max_bad_fraction * rows:
        raise ValueError(
            f"{bad} of {rows} images could not be decoded, more than max_bad_fraction={args.max_bad_fraction}: "
            f"see {folder.bad_images}."
        )
