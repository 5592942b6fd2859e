"""Kept: the share of images whose most probable class is the same after masking by the saliency map.
It does not depend on the scale of the probabilities. Higher is better.
"""

import datasets
import evaluate
import numpy as np


def kept(predictions, references, average=True):
    """100 mean [argmax after masking = argmax before], in percent.

    Args:
        predictions: the most probable class id after masking, (num_images,).
        references: the same before masking.
        average: the mean over images, or with False a list with one value per image.

    Returns:
        kept: images that keep their class in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, unequal in length, or anything but whole numbers of 0 or more.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/kept")
        >>> metric.compute(predictions=[3, 7], references=[3, 5])
        {'kept': 50.0}
    """
    after, before = _class_ids(predictions, "predictions"), _class_ids(references, "references")
    if after.size != before.size:
        raise ValueError(f"predictions has {after.size} values but references {before.size}: give one pair per image")
    values = 100.0 * (after == before)
    return float(values.mean()) if average else values.tolist()


def _class_ids(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give one class id per image, at least one")
    wrong = values[~np.isfinite(values) | (values != np.floor(values)) | (values < 0)]
    if wrong.size:
        raise ValueError(f"{argument} holds {wrong[0]:g}: give class ids, not probabilities or logits")
    return values


class Kept(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=kept.__doc__,
            # int64 would cut 0.7 down to 0 before it could be refused
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, average=True):
        return {"kept": kept(predictions, references, average=average)}
