"""The precision of the backbone's passes: chosen where the settings leave it open, and compared with float32."""

from collections.abc import Sequence

import numpy as np
import torch
from castream.artifacts.precision import prefers_bfloat16

from .settings import EvaluationSettings


def choose_autocast(settings: EvaluationSettings, model: torch.nn.Module) -> str:
    """What the settings say; for `"auto"`, `"bf16"` for a model in float32 where that is faster, or `"off"`."""
    if settings.autocast != "auto":
        return settings.autocast
    return "bf16" if model.dtype == torch.float32 and prefers_bfloat16(model.device) else "off"


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
