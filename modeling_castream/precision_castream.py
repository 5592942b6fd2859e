"""Which precision a network's forward passes are faster in on this very machine."""

import time

import torch

from .features_castream import evaluating, run_backbone

_ROUNDS = 3
_WORTH_IT = 0.9  # of float32's time: for less, no digit is given away
# Device -> what was found there.
_faster: dict[torch.device, torch.dtype | None] = {}


def faster_dtype(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.dtype | None:
    """torch.bfloat16 where the backbone's passes under autocast to it take at most 0.9 of float32's time, else None.

    Timed once per process and device. Processors with AMX or AVX512-BF16 and GPUs need about half the time, other
    processors often more than for float32.

    Args:
        model: a CAStreamForImageClassification in float32; of any other dtype, None comes back.
        pixel_values: (batch_size, num_channels, height, width), a few images of the usual size.
    """
    if model.dtype != torch.float32:
        return None
    if model.device not in _faster:
        pixel_values, seconds = pixel_values.to(model.device), {None: [], torch.bfloat16: []}
        with evaluating(model):
            for _ in range(1 + _ROUNDS):  # in turns; the first one makes what later ones keep
                for dtype, found in seconds.items():
                    found.append(_seconds(model, pixel_values, dtype))
        plain, half = (min(found[1:]) for found in seconds.values())
        _faster[model.device] = torch.bfloat16 if half <= _WORTH_IT * plain else None
    return _faster[model.device]


def _seconds(model: torch.nn.Module, pixel_values: torch.Tensor, dtype: torch.dtype | None) -> float:
    start = time.perf_counter()
    feature_maps, _ = run_backbone(model, pixel_values, dtype)
    feature_maps[-1].flatten()[0].item()  # waits for a GPU
    return time.perf_counter() - start


__all__ = ["faster_dtype"]
