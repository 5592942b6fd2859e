"""Kept: how often the network predicts the same class when only the salient part is shown."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Kept: the share of images whose most probable class is the same after masking by the saliency map. It does not depend on
the scale of the probabilities. Higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): the most probable class after masking, one per image.
    references (list of int): the same before masking.
    average (bool): the mean over images (default), or with `False` a list with one value per image.

Returns:
    kept: images that keep their class in percent, 0 to 100 (best).

Examples:
    >>> metric = evaluate.load("evaluation/metrics/kept")
    >>> metric.compute(predictions=[3, 7], references=[3, 5])
    {'kept': 50.0}
"""


def kept(predictions, references, average=True):
    """100 mean [argmax after masking = argmax before], in percent.

    Args:
        predictions: the most probable class id after masking, (num_images,).
        references: the same before masking.
        average: False for a list with one value per image.

    Raises:
        ValueError: empty, unequal in length, or anything but whole numbers of 0 or more.
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


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Kept(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            # int64 would cut 0.7 down to 0 before it could be refused
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, average=True):
        return {"kept": kept(predictions, references, average=average)}
