"""Deletion: area under the class's probability while the most salient pixels are removed."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Deletion: the area under the curve of the class's probability while pixels are removed from the image, the most
salient first. Lower is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): one curve an image: the class's probability at equally spaced shares of
        deleted pixels, both ends included, in [0, 1].
    average (bool): the mean over images (default), or with `False` a list with one value an image.

Returns:
    deletion: area in percent, 0 to 100 (lower is better).

Examples:
    >>> metric = evaluate.load("evaluation/metrics/deletion")
    >>> metric.compute(predictions=[[1.0, 0.5, 0.0], [0.75, 0.25, 0.25]])
    {'deletion': 43.75}
"""

_CITATION = """
@inproceedings{petsiuk2018rise,
  title     = {{RISE}: Randomized Input Sampling for Explanation of Black-box Models},
  author    = {Petsiuk, Vitali and Das, Abir and Saenko, Kate},
  booktitle = {BMVC},
  year      = {2018}
}
"""


# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def deletion(predictions, average=True):
    """100 mean of the area under each curve (trapezoid over the points, divided by the steps), in percent.

    Args:
        predictions: one curve an image, the class's probability at equally spaced shares of deleted pixels, both ends
            included; at least two points. Curves may differ in length.
        average: False for a list with one value an image.

    Raises:
        ValueError: no curve, a curve of fewer than two points, NaN or a value outside [0, 1].

    Source: Petsiuk et al., RISE, arXiv:1806.07421.
    """
    if len(predictions) == 0:
        raise ValueError("predictions is empty: give one curve an image, at least one")
    values = [100 * _area(_curve(curve, image)) for image, curve in enumerate(predictions)]
    return float(np.mean(values)) if average else values


def _area(curve):
    return float((curve.sum() - (curve[0] + curve[-1]) / 2) / (curve.size - 1))


def _curve(curve, image):
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or curve.size < 2:
        raise ValueError(f"predictions[{image}] has shape {curve.shape}: give a curve of two probabilities or more")
    if np.isnan(curve).any():
        raise ValueError(
            f"predictions[{image}] holds {np.isnan(curve).sum()} NaN of {curve.size}: leave that image out"
        )
    outside = curve[(curve < -ROUNDING) | (curve > 1 + ROUNDING)]
    if outside.size:
        raise ValueError(
            f"predictions[{image}] holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent"
        )
    return curve.clip(0, 1)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Deletion(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/1806.07421"],
        )

    def _compute(self, predictions, average=True):
        return {"deletion": deletion(predictions, average=average)}
