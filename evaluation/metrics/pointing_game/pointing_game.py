"""Pointing game: the share of images whose saliency map has its maximum on the object. Higher is better."""

import datasets
import evaluate
import numpy as np


def pointing_game(predictions, average=True):
    """100 hits / (hits + misses), in percent.

    Args:
        predictions: 1 for a hit, 0 for a miss, one per image, (num_images,).
        average: the mean over images, or with False a list with one value per image.

    Returns:
        pointing_game: hits in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, NaN or other than 0 and 1.

    Source: Zhang et al., arXiv:1608.00507, "pointing game". Differs from paper: the mean is over images, not over
        categories; call it once a category, and average, for the latter.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/pointing_game")
        >>> metric.compute(predictions=[1, 0, 1, 1])
        {'pointing_game': 75.0}
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number per image, at least one")
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"predictions holds {wrong[0]:g}: give 1 for a hit and 0 for a miss")
    values = 100 * values
    return float(values.mean()) if average else values.tolist()


class PointingGame(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016",
            inputs_description=pointing_game.__doc__,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1608.00507"],
        )

    def _compute(self, predictions, average=True):
        return {"pointing_game": pointing_game(predictions, average=average)}
