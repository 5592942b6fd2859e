"""Average drop (AD): the relative loss of the class's probability when the image is masked by its saliency map.
Lower is better. A map that keeps everything scores 0, so compare maps of equal area, or beside average gain.
"""

import datasets
import evaluate
import numpy as np

# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def average_drop(predictions, references, average=True):
    """100 mean max(p - o, 0) / p, and 0 where p = 0, in percent.

    Args:
        predictions: o, the class's probability after masking, (num_images,) in [0, 1].
        references: p, the same before masking.
        average: the mean over images, or with False a list with one value per image.

    Returns:
        average_drop: average drop in percent, 0 (nothing lost, best) to 100.

    Raises:
        ValueError: empty, unequal in length, NaN or outside [0, 1].

    Source: Chattopadhay et al., Grad-CAM++, arXiv:1710.11063.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/average_drop")
        >>> metric.compute(predictions=[0.4, 0.9], references=[0.8, 0.6])
        {'average_drop': 25.0}
    """
    after, before = _probabilities(predictions, "predictions"), _probabilities(references, "references")
    if after.size != before.size:
        raise ValueError(f"predictions has {after.size} values but references {before.size}: give one pair per image")
    # where p = 0 there is nothing to lose: the drop is 0, not 0 / 0
    values = 100 * np.maximum(before - after, 0) / np.where(before > 0, before, 1)
    return float(values.mean()) if average else values.tolist()


def _probabilities(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give one probability per image, at least one")
    outside = values[~((values >= -ROUNDING) & (values <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(f"{argument} holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent")
    return values.clip(0, 1)


class AverageDrop(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chattopadhay et al., Grad-CAM++, WACV 2018",
            inputs_description=average_drop.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/1710.11063"],
        )

    def _compute(self, predictions, references, average=True):
        return {"average_drop": average_drop(predictions, references, average=average)}
