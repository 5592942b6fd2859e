"""Pointing game: how often the map's maximum lies on the object."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Pointing game: the share of images whose saliency map has its maximum on the object. Higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int, bool or float): 1 where the map's maximum is on the object (a hit), else 0, one an image.
    average (bool): the mean over images (default), or with `False` a list with one value an image.

Returns:
    pointing_game: hits in percent, 0 to 100 (best).

Examples:
    >>> metric = evaluate.load("evaluation/metrics/pointing_game")
    >>> metric.compute(predictions=[1, 0, 1, 1])
    {'pointing_game': 75.0}
"""

_CITATION = """
@inproceedings{zhang2016excitation,
  title     = {Top-down Neural Attention by Excitation Backprop},
  author    = {Zhang, Jianming and Lin, Zhe and Brandt, Jonathan and Shen, Xiaohui and Sclaroff, Stan},
  booktitle = {ECCV},
  year      = {2016}
}
"""


def pointing_game(predictions, average=True):
    """100 hits / (hits + misses), in percent.

    Args:
        predictions: 1 for a hit, 0 for a miss, one an image, (num_images,).
        average: False for a list with one value an image.

    Raises:
        ValueError: empty, NaN or other than 0 and 1.

    Source: Zhang et al., arXiv:1608.00507, "pointing game". Differs from paper: the mean is over images, not over
        categories; call it once a category, and average, for the latter.
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number an image, at least one")
    if np.isnan(values).any():
        raise ValueError(
            f"predictions holds {np.isnan(values).sum()} NaN of {values.size} values: leave those images out"
        )
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"predictions holds {wrong[0]:g}: give 1 for a hit and 0 for a miss")
    values = 100 * values
    return float(values.mean()) if average else values.tolist()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PointingGame(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1608.00507"],
        )

    def _compute(self, predictions, average=True):
        return {"pointing_game": pointing_game(predictions, average=average)}
