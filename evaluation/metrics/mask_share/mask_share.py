"""Mask share, also called energy-based pointing game: the share of the saliency map's mass that lies inside the
object's mask or box. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# A float32 softmax may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def mask_share(predictions, average=True):
    """100 mean (mass inside / whole mass), in percent.

    Args:
        predictions: the share of the map's mass inside the mask, in [0, 1], (num_images,).
        average: the mean over images, or with False a list with one value per image.

    Returns:
        mask_share: mean share in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, NaN or outside [0, 1].

    Source: Wang et al., Score-CAM, arXiv:1910.01279, "energy-based pointing game".

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/mask_share")
        >>> metric.compute(predictions=[0.5, 0.25])
        {'mask_share': 37.5}
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number per image, at least one")
    outside = values[~((values >= -ROUNDING) & (values <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(f"predictions holds {outside[0]:g}, outside [0, 1]: give shares, not percent")
    values = 100 * values.clip(0, 1)
    return float(values.mean()) if average else values.tolist()


class MaskShare(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Wang et al., Score-CAM, CVPR Workshops 2020",
            inputs_description=mask_share.__doc__,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1910.01279"],
        )

    def _compute(self, predictions, average=True):
        return {"mask_share": mask_share(predictions, average=average)}
