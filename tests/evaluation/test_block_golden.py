"""A block of images from pixels to metrics, against the research code's figures for both of its models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from castream.evaluation import EvaluationSettings
from castream.evaluation.block import evaluate_block, read_items, score_curve_ends, score_map
from castream.evaluation.data import Block
from castream.evaluation.scorer import Scorer

from tests.evaluation.golden_model import golden_model
from tests.reference import formula

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "reference" / "metrics_public.npz")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MODELS = {"stream": "ca", "gap": "gap"}
METHODS = {"gradcam": "grad_cam", "gradcampp": "grad_cam_plus_plus", "scorecam": "score_cam"}
PERCENT = {"ad": "average_drop", "ag": "average_gain", "ai": "average_increase"}


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def block():
    images, pixel_values = (torch.from_numpy(array) for array in formula.images("metrics_public"))
    labels = [[int(label)] for label in REFERENCE["labels"]]
    names = [str(index) for index in range(4)]
    return Block(0, list(range(4)), names, labels, [None] * 4, images=images, pixel_values=pixel_values)


def scorer_for(model, pooling, method="grad_cam"):
    settings = EvaluationSettings(methods=(method,), poolings=(pooling,), batch_size=64)
    return Scorer(model, settings, MEAN, STD)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_before_masking(model, block, name):
    scorer = scorer_for(model, MODELS[name])
    features = scorer.features(block.pixel_values)
    probabilities = scorer.probabilities(features)[MODELS[name]]
    np.testing.assert_allclose(probabilities.numpy(), REFERENCE[f"{name}.probs"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name == "scorecam" else ()) for name in METHODS]
)
@pytest.mark.parametrize("name", MODELS)
def test_metrics_of_saliency_methods(model, block, name, method, monkeypatch):
    """Maps are ours; only the order of equally salient pixels, which the reference leaves to chance, is stored."""
    stored = torch.from_numpy(REFERENCE[f"{name}.{method}.order"].astype(np.int64))
    monkeypatch.setattr("castream.evaluation.block.saliency_order", lambda saliency, protocol: stored)
    rows, maps = evaluate_block(scorer_for(model, MODELS[name], METHODS[method]), block)
    expected = f"{name}.{method}"
    np.testing.assert_allclose(
        maps[METHODS[method], MODELS[name], False].numpy(), REFERENCE[f"{expected}.map"], atol=5e-5, rtol=0
    )
    masked = np.take_along_axis(REFERENCE[f"{expected}.probs_masked"], REFERENCE["labels"][:, None], 1)[:, 0]
    np.testing.assert_allclose([row["probability_masked"] for row in rows], masked, atol=1e-5, rtol=0)
    for short, metric in PERCENT.items():
        np.testing.assert_allclose([row[metric] for row in rows], REFERENCE[f"{expected}.{short}"], atol=1e-3, rtol=0)
    for metric in ("insertion", "deletion"):
        curves = [row[f"{metric}_curve"] for row in rows]
        np.testing.assert_allclose(curves, REFERENCE[f"{expected}.{metric}.curve"], atol=1e-5, rtol=0)
        areas = [row[metric] for row in rows]
        np.testing.assert_allclose(areas, 100 * REFERENCE[f"{expected}.{metric}.auc"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_metrics_of_a_map_without_ties(model, block, name):
    """Our own order of pixels: the synthetic map has no ties."""
    scorer = scorer_for(model, MODELS[name])
    items = read_items(scorer, block)
    saliency = torch.from_numpy(formula.saliency("metrics_public"))
    scores = score_map(scorer, items, saliency, score_curve_ends(scorer, items))
    masked = np.take_along_axis(REFERENCE[f"{name}.synthetic.probs_masked"], REFERENCE["labels"][:, None], 1)[:, 0]
    np.testing.assert_allclose(scores.masked.probability[MODELS[name]].numpy(), masked, atol=1e-5, rtol=0)
    for metric in ("insertion", "deletion"):
        curve = scores.curves[metric][MODELS[name]].numpy()
        np.testing.assert_allclose(curve, REFERENCE[f"{name}.synthetic.{metric}.curve"], atol=1e-5, rtol=0)


def test_both_poolings_at_once_are_those_of_single_runs(model, block):
    """Sharing backbone passes among methods, poolings and controls changes no figure."""
    both = EvaluationSettings(methods=("grad_cam", "raw_attention"), controls=("map_only", "norm"), batch_size=3)
    shared, _ = evaluate_block(Scorer(model, both, MEAN, STD), block)
    for pooling in ("gap", "ca"):
        alone, _ = evaluate_block(scorer_for(model, pooling), block)
        mine = [row for row in shared if (row["method"], row["pooling"], row["control"]) == ("grad_cam", pooling, "")]
        for metric in ("average_drop", "average_gain", "insertion", "deletion"):
            np.testing.assert_allclose([row[metric] for row in mine], [row[metric] for row in alone], atol=1e-3)
