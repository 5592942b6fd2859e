"""Average drop: what the class loses when only the salient part of the image is shown."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Average drop (AD): the relative loss of the class's probability when the image is masked by its saliency map.
Lower is better. A map that keeps everything scores 0, so compare maps of equal area, or beside average gain.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): o, the class's probability after masking, one an image, in [0, 1].
    references (list of float): p, the same before masking.
    average (bool): the mean over images (default), or with `False` a list with one value an image.

Returns:
    average_drop: average drop in percent, 0 (nothing lost, best) to 100.

Examples:
    >>> metric = evaluate.load("evaluation/metrics/average_drop")
    >>> metric.compute(predictions=[0.4, 0.9], references=[0.8, 0.6])
    {'average_drop': 25.0}
"""

_CITATION = """
@inproceedings{chattopadhay2018gradcampp,
  title     = {Grad-{CAM}++: Generalized Gradient-Based Visual Explanations for Deep Convolutional Networks},
  author    = {Chattopadhay, Aditya and Sarkar, Anirban and Howlader, Prantik and Balasubramanian, Vineeth N},
  booktitle = {WACV},
  year      = {2018}
}
"""


# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def average_drop(predictions, references, average=True):
    """100 mean max(p - o, 0) / p, and 0 where p = 0, in percent.

    Args:
        predictions: o, the class's probability after masking, (num_images,) in [0, 1].
        references: p, the same before masking.
        average: False for a list with one value an image.

    Raises:
        ValueError: empty, unequal in length, NaN or outside [0, 1].

    Source: Chattopadhay et al., Grad-CAM++, arXiv:1710.11063.
    """
    after, before = _probabilities(predictions, "predictions"), _probabilities(references, "references")
    if after.size != before.size:
        raise ValueError(f"predictions has {after.size} values but references {before.size}: give one pair an image")
    # where p = 0 there is nothing to lose: the drop is 0, not 0 / 0
    values = 100 * np.maximum(before - after, 0) / np.where(before > 0, before, 1)
    return float(values.mean()) if average else values.tolist()


def _probabilities(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give one probability an image, at least one")
    if np.isnan(values).any():
        raise ValueError(
            f"{argument} holds {np.isnan(values).sum()} NaN of {values.size} values: leave those images out"
        )
    outside = values[(values < -ROUNDING) | (values > 1 + ROUNDING)]
    if outside.size:
        raise ValueError(f"{argument} holds {outside[0]:g}, outside [0, 1]: give probabilities, not logits or percent")
    return values.clip(0, 1)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AverageDrop(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/1710.11063"],
        )

    def _compute(self, predictions, references, average=True):
        return {"average_drop": average_drop(predictions, references, average=average)}
