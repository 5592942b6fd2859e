"""Average increase (AI), also called increase in confidence: the share of images whose class is strictly more probable
after masking by the saliency map. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def average_increase(predictions, references, average=True):
    """100 mean [o > p], a strict comparison, in percent.

    Args:
        predictions: o, the class's probability after masking, (num_images,) in [0, 1].
        references: p, the same before masking.
        average: the mean over images, or with False a list with one value per image.

    Returns:
        average_increase: average increase in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, unequal in length, NaN or outside [0, 1].

    Source: Chattopadhay et al., Grad-CAM++, arXiv:1710.11063, "increase in confidence".

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/average_increase")
        >>> metric.compute(predictions=[0.4, 0.9], references=[0.8, 0.6])
        {'average_increase': 50.0}
    """
    after, before = _probabilities(predictions, "predictions"), _probabilities(references, "references")
    if after.size != before.size:
        raise ValueError(f"predictions has {after.size} values but references {before.size}: give one pair per image")
    values = 100.0 * (after > before)
    return float(values.mean()) if average else values.tolist()


def _probabilities(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give one probability per image, at least one")
    outside = values[~((values >= -ROUNDING) & (values <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(f"{argument} holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent")
    return values.clip(0, 1)


class AverageIncrease(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chattopadhay et al., Grad-CAM++, WACV 2018",
            inputs_description=average_increase.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/1710.11063"],
        )

    def _compute(self, predictions, references, average=True):
        return {"average_increase": average_increase(predictions, references, average=average)}
