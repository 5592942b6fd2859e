"""Sparsity: the maximum of the saliency map over its mean, 1 for a flat map, and the larger the fewer pixels stand out.
It has no unit and no best value: it says how focused maps are, not how right.
"""

import datasets
import evaluate
import numpy as np

# A mean of equal values may round to just above them.
ROUNDING = 1e-6


def sparsity(predictions, average=True):
    """mean of (maximum / mean of the map), a ratio of 1 or more.

    Args:
        predictions: the map's maximum over its mean, at least 1, (num_images,).
        average: the mean over images, or with False a list with one value per image.

    Returns:
        sparsity: mean ratio, at least 1; no percentage.

    Raises:
        ValueError: empty, NaN or below 1 or infinite.

    Source: Gomez et al., arXiv:2201.13291.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/sparsity")
        >>> metric.compute(predictions=[4.0, 2.0])
        {'sparsity': 3.0}
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number per image, at least one")
    wrong = values[~((values >= 1 - ROUNDING) & np.isfinite(values))]  # NaN, too
    if wrong.size:
        raise ValueError(
            f"predictions holds {wrong[0]:g}: give maximum / mean of a map, which is finite and at least 1"
        )
    values = values.clip(min=1)
    return float(values.mean()) if average else values.tolist()


class Sparsity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Gomez et al., Metrics for saliency map evaluation, ICPRAI 2022",
            inputs_description=sparsity.__doc__,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2201.13291"],
        )

    def _compute(self, predictions, average=True):
        return {"sparsity": sparsity(predictions, average=average)}
