"""Insertion: the area under the curve of the class's probability while pixels enter a blurred image, the most
salient first. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def insertion(predictions, average=True):
    """100 mean of the area under each curve (trapezoid over the points, divided by the steps), in percent.

    Args:
        predictions: one curve per image, the class's probability at equally spaced shares of inserted pixels, both ends
            included; at least two points. Curves may differ in length.
        average: the mean over images, or with False a list with one value per image.

    Returns:
        insertion: area in percent, 0 to 100 (higher is better).

    Raises:
        ValueError: no curve, a curve of fewer than two points, NaN or a value outside [0, 1].

    Source: Petsiuk et al., RISE, arXiv:1806.07421.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/insertion")
        >>> metric.compute(predictions=[[0.0, 0.5, 1.0], [0.25, 0.25, 0.75]])
        {'insertion': 43.75}
    """
    if len(predictions) == 0:
        raise ValueError("predictions is empty: give one curve per image, at least one")
    values = [100 * _area(_curve(curve, image)) for image, curve in enumerate(predictions)]
    return float(np.mean(values)) if average else values


def _area(curve):
    return float((curve.sum() - (curve[0] + curve[-1]) / 2) / (curve.size - 1))


def _curve(curve, image):
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or curve.size < 2:
        raise ValueError(f"predictions[{image}] has shape {curve.shape}: give a curve of two probabilities or more")
    outside = curve[~((curve >= -ROUNDING) & (curve <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(
            f"predictions[{image}] holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent"
        )
    return curve.clip(0, 1)


class Insertion(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Petsiuk et al., RISE, BMVC 2018",
            inputs_description=insertion.__doc__,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/1806.07421"],
        )

    def _compute(self, predictions, average=True):
        return {"insertion": insertion(predictions, average=average)}
