"""The precision of the backbone's passes: chosen where the settings leave it open, and compared with float32."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from modeling_castream.backbone_castream import num_input_channels
from modeling_castream.features_castream import evaluating, run_backbone

from .settings import EvaluationSettings

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


def choose_autocast(settings: EvaluationSettings, model: torch.nn.Module, size: tuple[int, int]) -> str:
    """What the settings say; for `"auto"`, `"bf16"` where that is faster with this model on its device, or `"off"`.

    Args:
        size: (height, width) of the network's input.
    """
    if settings.autocast != "auto":
        return settings.autocast
    pixel_values = torch.zeros(4, num_input_channels(model.config), *size)
    return "off" if faster_dtype(model, pixel_values) is None else "bf16"


def correlations(rows: list[dict], exact: list[dict], metrics: Sequence[str]) -> dict[str, float | None]:
    """Pearson's correlation of each metric's values in two runs over the same images, all rows of the table together.

    Args:
        rows, exact: of `evaluate_block`, in the same order.

    Returns:
        By metric; None where the values of a run do not differ from one another.
    """
    found = {}
    for name in metrics:
        pairs = [(row[name], other[name]) for row, other in zip(rows, exact, strict=True) if row.get(name) is not None]
        ours, theirs = np.array(pairs, np.float64).reshape(-1, 2).T
        varies = len(pairs) > 1 and ours.std() > 0 and theirs.std() > 0
        found[name] = float(np.corrcoef(ours, theirs)[0, 1]) if varies else None
    return found
