"""Sparsity: how far the map stands out of its mean."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Sparsity: the maximum of the saliency map over its mean. 1 for a flat map, and the larger the fewer pixels are salient.
It has no unit and no best value: it says how focused maps are, not how right.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): maximum over mean of the saliency map, one an image, at least 1.
    average (bool): the mean over images (default), or with `False` a list with one value an image.

Returns:
    sparsity: mean ratio, at least 1; no percentage.

Examples:
    >>> metric = evaluate.load("evaluation/metrics/sparsity")
    >>> metric.compute(predictions=[4.0, 2.0])
    {'sparsity': 3.0}
"""

_CITATION = """
@inproceedings{gomez2022metrics,
  title     = {Metrics for saliency map evaluation of deep learning explanation methods},
  author    = {Gomez, Tristan and Fr{\\'e}our, Thomas and Mouch{\\`e}re, Harold},
  booktitle = {ICPRAI},
  year      = {2022}
}
"""


# A mean of equal values may round to just above them.
ROUNDING = 1e-6


def sparsity(predictions, average=True):
    """mean of (maximum / mean of the map), a ratio of 1 or more.

    Args:
        predictions: the map's maximum over its mean, at least 1, (num_images,).
        average: False for a list with one value an image.

    Raises:
        ValueError: empty, NaN or below 1 or infinite.

    Source: Gomez et al., arXiv:2201.13291.
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number an image, at least one")
    if np.isnan(values).any():
        raise ValueError(
            f"predictions holds {np.isnan(values).sum()} NaN of {values.size} values: leave those images out"
        )
    wrong = values[(values < 1 - ROUNDING) | np.isinf(values)]
    if wrong.size:
        raise ValueError(
            f"predictions holds {wrong[0]:g}: give maximum / mean of a map, which is finite and at least 1"
        )
    values = values.clip(min=1)
    return float(values.mean()) if average else values.tolist()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Sparsity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2201.13291"],
        )

    def _compute(self, predictions, average=True):
        return {"sparsity": sparsity(predictions, average=average)}
