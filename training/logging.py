"""What a run shows while it goes: the progress bar, the tracker's log, saliency maps, and the checks that stop it."""

import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from modeling_castream import explain
from modeling_castream.overlay_castream import blend

from .checkpoint import Progress
from .objective import explained_variance

MIN_ROWS = 200  # rows before the share of bad ones means anything
PICTURED_IMAGES = 8  # in a picture of saliency maps
MAX_GROWTH = 1e4  # of the largest weight of a parameter, or from 1: attention saturates and logits overflow long before
MAX_LOSS = 3  # times that of uniform probabilities


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums of numbers over all processes."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


class MetricLogger:
    """The main process's progress bar and the tracker's log.

    Args:
        layers: names of the stream's blocks, for the entropy of their attention.
        queries: of the evidence blocks, for how well their mass predicts.
        log_steps: optimiser steps between entries.
        num_images: of all epochs; done: those of them that are done.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: list[str],
        queries: list[str],
        log_steps: int,
        num_images: int,
        done: int,
    ):
        self.accelerator, self.layers, self.queries, self.log_steps = accelerator, layers, queries, log_steps
        self.sums, self.images, self.since = {}, 0, time.time()
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=num_images, initial=done, unit="img", desc="training", disable=hidden)

    def log(self, progress: Progress, sums: dict[str, torch.Tensor], images: int, rate: float) -> None:
        """Take in an optimiser step; every `log_steps`, log the means since the last time.

        Args:
            sums: what the objective returned, summed over this process's images; images: of all processes.
        """
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.images += images
        self.bar.update(images)
        if progress.step % self.log_steps:
            return
        sums = self._totals()
        fidelity, entropies = sums.pop("fidelity", []), [value / self.images for value in sums.pop("entropy")]
        explained = {
            f"r2_{query}": explained_variance(*fidelity[4 * place :][:4])
            for place, query in enumerate(self.queries if fidelity else [])
        }
        speed = self.images / (time.time() - self.since)
        entry = {name: value / self.images for name, [value] in sums.items()}
        entry |= {"learning_rate": rate, "images_per_second": speed, "epoch": progress.epoch}
        entry |= {f"attention_entropy/{name}": value for name, value in zip(self.layers, entropies, strict=True)}
        self.accelerator.log(entry | explained, step=progress.step)
        shown = {"loss": entry["loss"], "entropy": entropies[-1], **explained}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        self.sums, self.images, self.since = {}, 0, time.time()

    def _totals(self) -> dict[str, list[float]]:
        """The sums over all processes, flat."""
        values = {name: value.flatten().tolist() for name, value in self.sums.items()}
        totals = iter(total(self.accelerator, [one for several in values.values() for one in several]))
        return {name: [next(totals) for _ in several] for name, several in values.items()}

    def log_saliency(self, step: int, objective, pixel_values: torch.Tensor) -> None:
        """Log what the model looks at on the first few images of a normalised batch."""
        if not self.accelerator.is_main_process:
            return
        picture = draw_saliency(objective, pixel_values[:PICTURED_IMAGES])
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("saliency", picture, step)
            elif tracker.name == "trackio":
                import trackio  # installed, since it is the tracker

                tracker.tracker.log({"saliency": trackio.Image(picture.permute(1, 2, 0).numpy())}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({"saliency": [picture.permute(1, 2, 0).numpy()]}, step=step)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()


def draw_saliency(objective, pixel_values: torch.Tensor) -> torch.Tensor:
    """Draw three rows: the images, the attention of the last block, and attention_cam for the predicted class.

    Args:
        objective: an Objective, whose model is left as it was.
        pixel_values: (num_images, 3, height, width), normalised.

    Returns:
        (3, 3 * height, num_images * width), uint8.
    """
    images = [to_pil_image(image) for image in (pixel_values * objective.std + objective.mean).clamp(0, 1).cpu()]
    pictures = list(images)
    for method in ("raw_attention", "attention_cam"):
        maps = explain(objective.model, pixel_values, method=method, pooling="ca").cpu().numpy()
        pictures += [blend(image, saliency).convert("RGB") for image, saliency in zip(images, maps, strict=True)]
    return make_grid([pil_to_tensor(picture) for picture in pictures], nrow=len(images), padding=0)


def check_loss(loss: float, step: int, rate: float, batches: list[dict]) -> None:
    """Stop before a loss that is not a number spoils the weights.

    Raises:
        ValueError: naming the step, the learning rate and the images of this process.
    """
    if math.isfinite(loss):
        return
    keys = [key for batch in batches for key in batch["keys"]]
    listed = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise ValueError(
        f"the loss is {loss} at step {step} with learning rate {rate:.3g}, on the images {listed}: lower "
        "learning_rate or raise warmup; the last checkpoint is from before."
    )


class WeightCheck:
    """Keeps diverged weights out of every checkpoint and model: a loss may be finite once more.

    Args:
        changing: the tensors that training changes, by name, as it begins.
    """

    def __init__(self, changing: dict[str, torch.Tensor]):
        self.changing = {name: value for name, value in changing.items() if value.is_floating_point() and value.numel()}
        self.limits = {
            name: MAX_GROWTH * max(1.0, value.detach().abs().max().item())
            for name, value in self.changing.items()
            if isinstance(value, torch.nn.Parameter)
        }

    def __call__(self, step: int) -> None:
        """Look at the weights after a step.

        Raises:
            ValueError: naming the weight and the step.
        """
        for name, value in self.changing.items():
            largest = value.detach().abs().max().item()
            if largest <= self.limits.get(name, math.inf) and math.isfinite(largest):
                continue
            what = f"has grown to {largest:.3g}" if math.isfinite(largest) else "is no longer finite"
            raise ValueError(
                f"the run has diverged: {name} {what} after step {step}: lower learning_rate or raise warmup; the last "
                "checkpoint is from before."
            )


def check_final_loss(loss: float, uniform: float) -> None:
    """Refuse to call a run done that has come out far worse than knowing nothing.

    Args:
        loss: of its last step, per image; uniform: that of uniform probabilities.

    Raises:
        ValueError: naming both.
    """
    if loss > MAX_LOSS * uniform:
        raise ValueError(
            f"the run has diverged: the loss of its last step is {loss:.3g} per image, that of uniform probabilities "
            f"{uniform:.3g}: lower learning_rate or raise warmup, and choose another output_dir."
        )


class BadImages:
    """Counts and lists the images that do not decode, over all processes.

    Args:
        note: writes a list of them to the run's folder, in the main process.
        path: of that list, for messages.
        max_fraction: of the images; more of them stop the run.
    """

    def __init__(self, accelerator: Accelerator, note, path, max_fraction: float):
        self.accelerator, self.note, self.path, self.max_fraction = accelerator, note, path, max_fraction

    def record(self, bad: list) -> None:
        """List those that this process has come across since the last time; for all processes to call together."""
        found = gather_object(bad) if self.accelerator.num_processes > 1 else bad
        if self.accelerator.is_main_process:
            self.note(found)

    def check(self, bad: int, rows: int, final: bool = False) -> None:
        """Stop where too many images did not decode.

        Args:
            bad, rows: images that did not, and all that were read.
            final: whether no more are to come, so that few rows mean something, too.

        Raises:
            ValueError: naming the numbers and the list.
        """
        if (final or rows > MIN_ROWS) and bad > self.max_fraction * rows:
            raise ValueError(
                f"{bad} of {rows} images could not be decoded, more than max_bad_fraction={self.max_fraction}: "
                f"see {self.path}."
            )
