"""The loop: what makes a step, its learning rate and gradients, the average of weights, and being told to stop."""

import ctypes
import itertools
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from .checkpoint import Progress
from .logging import BadImages, check_final_loss, check_loss, total
from .objective import Mixer, Objective

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest rate, as in torch's OneCycleLR
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class InterruptedRun(Exception):
    """The run was told to stop, and what there was to save is saved."""


class Interruption:
    """Turns SIGTERM and SIGINT into InterruptedRun: at once, or, inside `deferred`, at its end.

    A launcher that is killed cannot pass a signal on, and its orphan would keep the run's folder occupied: so a process
    started by one (`accelerate launch`, torchrun) asks Linux for a SIGTERM then. After the first signal SIGTERM is
    therefore ignored, since it may only tell that the launcher has died of the same Ctrl-C; a second SIGINT ends the
    process.
    """

    def __init__(self):
        self.requested = self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
        if launched and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What must not be torn apart: it looks at `requested` itself, or finishes first.

        Raises:
            InterruptedRun: at the end, where a signal came in the meantime.
        """
        self._deferred = True
        yield
        self._deferred = False
        if self.requested:
            raise InterruptedRun("stopped: the same command goes on from here")

    def _handle(self, number: int, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._deferred:
            raise InterruptedRun("stopped: the same command goes on from here")
        if os.environ.get("RANK", "0") == "0":  # a step may last: written directly, as nothing else may in a handler
            os.write(2, b"\ntold to stop: saving after this step\n")


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of how much of the run is done, and of nothing else.

    So the trace is the same for any number of processes, and a resumed run needs no state of a scheduler.

    Args:
        kind: `"one_cycle"`, `"cosine"` or `"constant"`.
        highest: the highest rate.
        warmup: fraction of the run over which the rate rises to it.
    """

    kind: str
    highest: float
    warmup: float

    def __call__(self, fraction: float) -> float:
        """Learning rate at a point of the run, in [0, 1]; beyond 1 it stays where it ended."""
        fraction = min(max(fraction, 0.0), 1.0)
        cycle = self.kind == "one_cycle"
        if fraction < self.warmup:
            low = ONE_CYCLE_START if cycle else 0.0
            rise = fraction / self.warmup
            return self.highest * (low + (1 - low) * (_half_cosine(1 - rise) if cycle else rise))
        if self.kind == "constant":
            return self.highest
        low = ONE_CYCLE_END if cycle else 0.0
        return self.highest * (low + (1 - low) * _half_cosine((fraction - self.warmup) / (1 - self.warmup)))


def _half_cosine(fraction: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class Step:
    """What an optimiser step is made of.

    Args:
        number: from 1.
        batches: of this process; none where it has run out of them.
        filler: a batch to take part with at weight zero then.
        images: of all processes.
        fraction: of the run that is done at the middle of the step.
    """

    number: int
    batches: list[dict]
    filler: dict
    images: int
    fraction: float


class Steps:
    """The optimiser steps of a run, from where it stands to its end, or until it is told to stop.

    A step has come when all processes have read their batches; an epoch is over when all have run out.

    Args:
        loader: StreamLoader or CachedLoader of this process.
        progress, place: where the run stands, and this process in the data of its epoch.
        epochs, max_steps: whichever comes first ends the run.
        num_images: of all epochs and processes.

    Attributes:
        progress, place: after the step that was yielded last.
        stopped: whether the run was told to stop; the last step read is then not yielded, nor counted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loader,
        progress: Progress,
        place: dict | None,
        interruption: Interruption,
        bad_images: BadImages,
        *,
        epochs: int,
        max_steps: int | None,
        num_images: int,
    ):
        self.accelerator, self.loader, self.progress, self.place = accelerator, loader, progress, place
        self.interruption, self.bad_images = interruption, bad_images
        self.epochs, self.max_steps, self.num_images = epochs, max_steps, num_images
        self.stopped, self._filler = False, None
        self._seen = loader.rows, len(loader.bad)

    def __iter__(self) -> Iterator[Step]:
        while not self._is_complete():
            for step in self._epoch():
                yield step
                if self._is_complete():
                    return
            if self.stopped:
                return
            self.progress.epoch, self.place = self.progress.epoch + 1, None

    def _is_complete(self) -> bool:
        by_steps = bool(self.max_steps) and self.progress.step >= self.max_steps
        return by_steps or self.progress.epoch >= self.epochs

    def _epoch(self) -> Iterator[Step]:
        progress = self.progress
        batches = self.loader.epoch(progress.epoch, self.place)
        while True:
            read = list(itertools.islice(batches, self.accelerator.gradient_accumulation_steps))
            images = sum(len(batch["keys"]) for batch, _ in read)
            rows, bad = self._newly_read()
            counts = total(self.accelerator, [images, rows, len(bad), self.interruption.requested])
            images, rows, num_bad, self.stopped = int(counts[0]), int(counts[1]), int(counts[2]), bool(counts[3])
            if self.stopped:
                return
            progress.rows, progress.bad = progress.rows + rows, progress.bad + num_bad
            if num_bad:
                self.bad_images.record(bad)
            self.bad_images.check(progress.bad, progress.rows, final=not images)
            if not images:
                return
            if read:
                self._filler, self.place = read[-1]
            filler = self._filler or self._read_filler()
            fraction = self._fraction(images)
            progress.step, progress.images = progress.step + 1, progress.images + images
            yield Step(progress.step, [batch for batch, _ in read], filler, images, fraction)

    def _newly_read(self) -> tuple[int, list]:
        """Rows that this process has read since the last time, and which of them did not decode."""
        rows, bad = self.loader.rows - self._seen[0], self.loader.bad[self._seen[1] :]
        self._seen = self.loader.rows, len(self.loader.bad)
        return rows, bad

    def _read_filler(self) -> dict:
        """A first batch, for a process that has had none yet; it does not count as read.

        Raises:
            ValueError: where this process has not a single image.
        """
        found = next(iter(self.loader.epoch(self.progress.epoch)), None)
        self._newly_read()
        if found is None:
            raise ValueError(
                "this process has no image that can be decoded: check the dataset, or use fewer processes."
            )
        self._filler = found[0]
        return self._filler

    def _fraction(self, images: int) -> float:
        """Of the run, at the middle of its next step: by images, or by `max_steps` where these end it sooner."""
        by_images = (self.progress.images + images / 2) / self.num_images
        return max(by_images, (self.progress.step + 0.5) / self.max_steps) if self.max_steps else by_images


class Update:
    """Takes an optimiser step.

    Args:
        objective, optimizer: of this process; they are prepared for several processes here.
        max_grad_norm: gradients are clipped to it; 0: not.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        mixer: Mixer,
        average: "WeightAverage",
        max_grad_norm: float,
    ):
        self.accelerator, self.uniform_loss = accelerator, objective.uniform_loss
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.schedule, self.mixer, self.average, self.max_grad_norm = schedule, mixer, average, max_grad_norm
        self.last = None

    def __call__(self, step: Step) -> tuple[dict[str, torch.Tensor], float]:
        """Take a step.

        Returns:
            What `backward` returns, and the learning rate.

        Raises:
            ValueError: where the loss is no number, before it spoils the weights.
        """
        rate = self.schedule(step.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1)
        batches = [self.mixer(batch, step.number - 1, part) for part, batch in enumerate(step.batches)]
        step = replace(step, batches=batches)
        sums = backward(self.accelerator, self.objective, step)
        check_loss(sums["loss"].item(), step.number, rate, batches)
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(step.number)
        self.last = sums["loss"], step.images
        return sums, rate

    def finish(self) -> None:
        """Put the averages in the place of the weights.

        Raises:
            ValueError: where the loss of the last step was far worse than that of knowing nothing.
        """
        if self.last:
            loss, images = self.last
            check_final_loss(total(self.accelerator, [loss.item()])[0] / images, self.uniform_loss)
        self.average.apply()


def backward(accelerator: Accelerator, objective: torch.nn.Module, step: Step) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all images of a step, wherever they are.

    The processes average their gradients; so each scales its summed loss by the number of processes and divides by the
    number of images of all of them. Then uneven and missing batches count for what they hold.

    Args:
        objective: prepared by the accelerator.

    Returns:
        What the objective returns, summed over this process's images, detached; zero where it has none.
    """
    # accelerator.backward divides by the accumulation steps
    scale = accelerator.num_processes / step.images * accelerator.gradient_accumulation_steps
    weight = 1.0 if step.batches else 0.0
    batches, sums = step.batches or [step.filler], {}
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(objective):
            result = objective(to_device(batch, accelerator.device))
            accelerator.backward(result["loss"] * (scale * weight))
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value.detach() * weight
    return sums


class WeightAverage:
    """Exponential moving average of weights: average <- decay * average + (1 - decay) * weight, after every step.

    Early on the decay is lower, (1 + step) / (10 + step), so that the initial weights do not linger. (timm's ModelEmaV3
    would keep a copy of the frozen backbone, too.)

    Args:
        weights: those that are trained, by name.
        decay: in (0, 1); 0: no averages are kept.
    """

    def __init__(self, weights: dict[str, torch.nn.Parameter], decay: float):
        self.weights, self.decay = weights if decay else {}, decay
        self.averages = {name: value.detach().clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.weights[name].to(average.dtype), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averages in the place of the weights."""
        for name, average in self.averages.items():
            self.weights[name].copy_(average)


def to_device(value, device: torch.device):
    """A batch with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(entry, device) for entry in value)
    return value
