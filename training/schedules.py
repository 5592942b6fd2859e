"""Learning rate schedules, as functions of the progress of the run and nothing else.

Progress is the fraction of the run's images that have been used. So the trace is the same for any number of processes,
and a resumed run needs no state of a scheduler.
"""

import math

from .arguments import TrainingArguments

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest rate, as in torch's OneCycleLR


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
