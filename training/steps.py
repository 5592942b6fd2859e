"""One optimiser step over any number of processes, in which every image weighs the same."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator


def take(batches: Iterator[tuple[dict, dict]], count: int) -> tuple[list[dict], dict | None]:
    """Up to `count` batches, and the state after the last one (None without any)."""
    taken = list(itertools.islice(batches, count))
    return [batch for batch, _ in taken], taken[-1][1] if taken else None


def spare_batch(loader, epoch: int) -> dict:
    """A batch to take part with at weight zero, for a process that has used none yet; it counts as not read.

    Raises:
        ValueError: where this process has not a single image.
    """
    counted = loader.rows, loader.bad
    found = next(iter(loader.epoch(epoch)), None)
    loader.rows, loader.bad = counted
    if found is None:
        raise ValueError("this process has no image that can be decoded: look at the dataset, or use fewer processes.")
    return found[0]


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums of numbers over all processes."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


def backward(
    accelerator: Accelerator, objective: torch.nn.Module, batches: list[dict], spare: dict, images: float
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all images of the step, wherever they are.

    The processes average their gradients; so each scales its summed loss by the number of processes and divides by the
    number of images of all of them. Then uneven and missing batches count for what they hold.

    Args:
        batches: of this process, on its device.
        spare: a batch to take part with, at weight zero, where this process has run out of batches.
        images: of all processes in this step.

    Returns:
        `loss`, `correct`, `entropy` summed over this process's images, detached; zero where it has none.
    """
    scale = (
        accelerator.num_processes / images * accelerator.gradient_accumulation_steps
    )  # backward divides by the latter
    weight = 1.0 if batches else 0.0
    sums = {}
    for batch, last in zip(batches or [spare], [*[False] * (len(batches) - 1), True], strict=True):
        with nullcontext() if last else accelerator.no_sync(objective):
            result = objective(batch)
            accelerator.backward(result["loss"] * (scale * weight))
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value.detach() * weight
    return sums


def to_device(value, device: torch.device):
    """A batch with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(entry, device) for entry in value)
    return value
