"""Mask share: how much of the saliency's mass lies inside the object's mask or box."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Mask share, also called energy-based pointing game: the share of the saliency map's mass that lies inside the object's
mask or box. Higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): the map's mass inside the mask over its whole mass, one an image, in [0, 1].
    average (bool): the mean over images (default), or with `False` a list with one value an image.

Returns:
    mask_share: mean share in percent, 0 to 100 (best).

Examples:
    >>> metric = evaluate.load("evaluation/metrics/mask_share")
    >>> metric.compute(predictions=[0.5, 0.25])
    {'mask_share': 37.5}
"""

_CITATION = """
@inproceedings{wang2020scorecam,
  title     = {Score-{CAM}: Score-Weighted Visual Explanations for Convolutional Neural Networks},
  author    = {Wang, Haofan and Wang, Zifan and Du, Mengnan and Yang, Fan and Zhang, Zijian and Ding, Sirui and
               Mardziel, Piotr and Hu, Xia},
  booktitle = {CVPR Workshops},
  year      = {2020}
}
"""


# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def mask_share(predictions, average=True):
    """100 mean (mass inside / whole mass), in percent.

    Args:
        predictions: the share of the map's mass inside the mask, in [0, 1], (num_images,).
        average: False for a list with one value an image.

    Raises:
        ValueError: empty, NaN or outside [0, 1].

    Source: Wang et al., Score-CAM, arXiv:1910.01279, "energy-based pointing game".
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number an image, at least one")
    if np.isnan(values).any():
        raise ValueError(
            f"predictions holds {np.isnan(values).sum()} NaN of {values.size} values: leave those images out"
        )
    outside = values[(values < -ROUNDING) | (values > 1 + ROUNDING)]
    if outside.size:
        raise ValueError(f"predictions holds {outside[0]:g}, outside [0, 1]: give shares, not percent")
    values = 100 * values.clip(0, 1)
    return float(values.mean()) if average else values.tolist()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MaskShare(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1910.01279"],
        )

    def _compute(self, predictions, average=True):
        return {"mask_share": mask_share(predictions, average=average)}
