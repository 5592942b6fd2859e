"""Negative perturbation: the accuracy, averaged over shares of removed pixels (10 % to 90 %), while the least salient
pixels go first. Higher is better.
"""

import datasets
import evaluate
import numpy as np


def negative_perturbation(predictions, references, average=True):
    """100 mean over images and fractions of [predicted class = label], in percent.

    Args:
        predictions: the predicted class ids of an image, one at each share of removed pixels, (num_images, num_shares).
        references: its label, (num_images,).
        average: the mean over images, or with False a list with one value per image, the percentage of the shares at
            which it is right.

    Returns:
        negative_perturbation: accuracy in percent, 0 to 100 (higher is better).

    Raises:
        ValueError: empty, unequal in length, rows of unequal length, or anything but whole numbers of 0 or more.

    Source: Chefer et al., arXiv:2012.09838.

    Examples:
        >>> metric = evaluate.load("evaluation/metrics/negative_perturbation")
        >>> metric.compute(predictions=[[3, 3, 3, 1], [5, 2, 5, 5]], references=[3, 2])
        {'negative_perturbation': 50.0}
    """
    if len({np.size(row) for row in predictions}) > 1:
        raise ValueError("predictions has rows of unequal length: give every image the same shares of removed pixels")
    classes, labels = _class_ids(predictions, "predictions", 2), _class_ids(references, "references", 1)
    if len(classes) != len(labels):
        raise ValueError(
            f"predictions has {len(classes)} rows but references {len(labels)} labels: give one each per image"
        )
    values = 100 * (classes == labels[:, None]).mean(axis=1)
    return float(values.mean()) if average else values.tolist()


def _class_ids(values, argument, ndim):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != ndim or values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}: give {ndim} dimension(s), none of them empty")
    wrong = values[~np.isfinite(values) | (values != np.floor(values)) | (values < 0)]
    if wrong.size:
        raise ValueError(f"{argument} holds {wrong[0]:g}: give class ids, not probabilities or logits")
    return values


class NegativePerturbation(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chefer et al., Transformer Interpretability Beyond Attention Visualization, CVPR 2021",
            inputs_description=negative_perturbation.__doc__,
            features=datasets.Features(
                {
                    # int64 would cut 0.7 down to 0 before it could be refused
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("float64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2012.09838"],
        )

    def _compute(self, predictions, references, average=True):
        return {"negative_perturbation": negative_perturbation(predictions, references, average=average)}
