"""Pixel average precision (PxAP): the average precision of an image's pixels, ranked by the saliency map, against the
object's mask or box. It depends on the order of the pixels only, not on the map's area or scale. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# A float32 computation may leave [0, 1] by rounding; what is further out is refused.
ROUNDING = 1e-6


def pixel_average_precision(predictions, average=True):
    """100 mean (average precision of an image's pixels), in percent.

    Args:
        predictions: the average precision per image, in [0, 1], (num_images,).
        average: the mean over images, or with False a list with one value per image.

    Returns:
        pixel_average_precision: mean average precision in percent, 0 to 100 (best).

    Raises:
        ValueError: empty, NaN or outside [0, 1].

    Source: Choe et al., arXiv:2001.07437, "PxAP". Differs from paper: each image has an average precision of its own;
        the paper pools the pixels of all images.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/pixel_average_precision")
        >>> metric.compute(predictions=[0.5, 0.25])
        {'pixel_average_precision': 37.5}
    """
    values = np.asarray(predictions, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"predictions has shape {values.shape}: give one number per image, at least one")
    outside = values[~((values >= -ROUNDING) & (values <= 1 + ROUNDING))]  # NaN, too
    if outside.size:
        raise ValueError(f"predictions holds {outside[0]:g}, outside [0, 1]: give shares, not percent")
    values = 100 * values.clip(0, 1)
    return float(values.mean()) if average else values.tolist()


class PixelAveragePrecision(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020",
            inputs_description=pixel_average_precision.__doc__,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2001.07437"],
        )

    def _compute(self, predictions, average=True):
        return {"pixel_average_precision": pixel_average_precision(predictions, average=average)}
