"""Average gain (AG): the win of the class's probability when the image is masked by its saliency map, relative to
what could be won. Higher is better. It complements average drop, which a map that keeps everything satisfies.
"""

import datasets
import evaluate
import numpy as np

# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def average_gain(predictions, references, average=True):
    """100 mean max(o - p, 0) / (1 - p), and 0 where p = 1, in percent.

    Args:
        predictions: o, the class's probability after masking, (num_images,) in [0, 1].
        references: p, the same before masking.
        average: the mean over images, or with False a list with one value per image.

    Returns:
        average_gain: average gain in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, unequal in length, NaN or outside [0, 1].

    Source: Zhang et al., Opti-CAM, arXiv:2301.07002.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/average_gain")
        >>> metric.compute(predictions=[0.4, 0.9], references=[0.8, 0.6])
        {'average_gain': 37.5}
    """
    after, before = _probabilities(predictions, "predictions"), _probabilities(references, "references")
    if after.size != before.size:
        raise ValueError(f"predictions has {after.size} values but references {before.size}: give one pair per image")
    # where p = 1 there is nothing to gain: the gain is 0, not 0 / 0
    values = 100 * np.maximum(after - before, 0) / np.where(before < 1, 1 - before, 1)
    return float(values.mean()) if average else values.tolist()


def _probabilities(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give one probability per image, at least one")
    outside = values[~((values >= -ROUNDING) & (values <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(f"{argument} holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent")
    return values.clip(0, 1)


class AverageGain(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Zhang et al., Opti-CAM, Computer Vision and Image Understanding, 2024",
            inputs_description=average_gain.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2301.07002"],
        )

    def _compute(self, predictions, references, average=True):
        return {"average_gain": average_gain(predictions, references, average=average)}
