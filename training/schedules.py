"""Learning rate schedules, as functions of the progress of the run and nothing else.

Progress is the fraction of the run's images that have been used (of its steps, where max_steps ends it sooner). So the
trace is the same for any number of processes, and a resumed run needs no state of a scheduler.
"""

import math

from .arguments import TrainingArguments
from .progress import Progress

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest rate, as in torch's OneCycleLR


def run_progress(args: TrainingArguments, progress: Progress, images: int, images_in_all: int) -> float:
    """Fraction of the run at the middle of its next step, by its images or by `max_steps`, whichever ends it first.

    Args:
        images: of the step, over all processes; images_in_all: of the run's epochs.
    """
    by_images = (progress.images + images / 2) / images_in_all
    return max(by_images, (progress.step + 0.5) / args.max_steps) if args.max_steps else by_images


def learning_rate(args: TrainingArguments, progress: float) -> float:
    """Learning rate at a point of the run.

    Args:
        args: `schedule`, `learning_rate`, `warmup`, `epochs`, `step_epochs`.
        progress: in [0, 1]; beyond 1 the rate stays where it ended.
    """
    progress = min(max(progress, 0.0), 1.0)
    cycle = args.schedule == "one_cycle"
    if progress < args.warmup:
        low = ONE_CYCLE_START if cycle else 0.0
        rise = progress / args.warmup
        return args.learning_rate * (low + (1 - low) * (_half_cosine(1 - rise) if cycle else rise))
    rest = (progress - args.warmup) / (1 - args.warmup)
    if args.schedule == "constant":
        return args.learning_rate
    if args.schedule == "step":
        return args.learning_rate * 0.1 ** math.floor(progress * args.epochs / args.step_epochs + 1e-9)
    low = ONE_CYCLE_END if cycle else 0.0
    return args.learning_rate * (low + (1 - low) * _half_cosine(rest))


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2
