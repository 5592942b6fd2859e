"""Insertion and deletion of one map, scored under GAP and CA, beside the forward passes that they cannot do without."""

from collections.abc import Callable

import torch
from castream.evaluation.block import Items, score_curve_ends, score_map
from castream.evaluation.masking import num_steps
from castream.evaluation.scorer import Scorer
from castream.evaluation.settings import EvaluationSettings
from torch import nn

from modeling_castream.features_castream import evaluating
from modeling_castream.saliency_castream import explain_features, extract

POOLINGS = ("gap", "ca")
MEAN = STD = [0.5, 0.5, 0.5]


def curve_contenders(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, Callable]:
    """Both curves of Grad-CAM's maps, and as many passes of images that are there already; the passes come first.

    A pass goes through the backbone and then through both poolings and the classifier. Each curve needs one for every
    point between its ends; the ends, one for the blurred images and one for a single image of the mean colour.
    """
    batch_size = len(pixel_values)
    settings = EvaluationSettings(
        methods=("grad_cam",), poolings=POOLINGS, metrics=("insertion", "deletion"), batch_size=batch_size
    )
    scorer = Scorer(model, settings, MEAN, STD)
    features = extract(model, pixel_values)
    target = features.logits("gap").argmax(1)
    saliency = explain_features(features, target, "grad_cam", "gap")
    before = scorer.score_features(features, target)
    items = Items(torch.arange(batch_size), target, target, pixel_values, pixel_values / 2 + 0.5, features, before)
    passes = 2 * (num_steps(*pixel_values.shape[2:]) - 1) + 1

    def forward() -> None:
        with evaluating(model):
            for images in [pixel_values] * passes + [pixel_values[:1]]:
                scorer.logits(scorer.features(images))

    def curves() -> None:
        with evaluating(model):
            score_map(scorer, items, saliency, score_curve_ends(scorer, items))

    return {"the forward passes alone": forward, "insertion and deletion": curves}


__all__ = ["curve_contenders"]
