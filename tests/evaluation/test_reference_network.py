"""Perturbed images through a network: the research code's probabilities and curves for its plain ResNet-18."""

from pathlib import Path

import numpy as np
import pytest
import torch
from castream.evaluation.masking import (
    mask_images,
    perturbation_images,
    pixel_order,
    saliency_order,
    upsample_saliency,
)
from torchvision.models import resnet18

from tests.evaluation.small import curve_images
from tests.reference import formula

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "reference" / "metrics_public.npz")
LABELS = torch.from_numpy(REFERENCE["labels"])
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MAPS = ["gradcam", "gradcampp", "scorecam", "synthetic"]
# mean areas when the order comes from a stable sort: insertion, deletion
STABLE = {
    "gradcam": (0.0656806156039238, 0.06401617079973221),
    "gradcampp": (0.06679963320493698, 0.06262781471014023),
    "scorecam": (0.0676056444644928, 0.0603250227868557),
    "synthetic": (0.05786637216806412, 0.06345324963331223),
}


@pytest.fixture(scope="module")
def network():
    model = resnet18(num_classes=10).eval()
    weights = {name: formula.formula_array(name, value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def public():
    images, pixel_values = formula.images("metrics_public")
    return torch.from_numpy(images), torch.from_numpy(pixel_values)


def full_size_map(name):
    if name == "synthetic":
        return torch.from_numpy(formula.saliency("metrics_public"))
    return upsample_saliency(torch.from_numpy(REFERENCE[f"gap.{name}.map"]), (64, 64))


def curve(network, points):
    """Probability of the label at each point, (4, points)."""
    logits = torch.stack([network(images) for images in points], dim=1)
    return logits.softmax(-1).gather(2, LABELS.view(4, 1, 1).expand(-1, logits.shape[1], 1))[..., 0].numpy()


@pytest.mark.parametrize("name", MAPS)
def test_masked_probabilities(network, public, name):
    probabilities = network(mask_images(public[0], full_size_map(name), MEAN, STD)).softmax(1)
    np.testing.assert_allclose(probabilities.numpy(), REFERENCE[f"gap.{name}.probs_masked"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MAPS)
def test_curves_with_the_stored_order(network, public, name):
    stored = pixel_order(full_size_map(name))
    if name != "synthetic":
        stored = torch.from_numpy(REFERENCE[f"gap.{name}.order"].astype(np.int64))
    for metric in ("insertion", "deletion"):
        expected = REFERENCE[f"gap.{name}.{metric}.curve"]
        points = curve_images(metric, public[1], stored)
        np.testing.assert_allclose(curve(network, points), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MAPS)
def test_our_order_is_the_stable_sort_of_the_reference(network, public, name):
    """Ties the other way round move these means by up to 4e-3."""
    order = saliency_order(full_size_map(name), "reference")
    for expected, metric in zip(STABLE[name], ("insertion", "deletion"), strict=True):
        points = curve(network, curve_images(metric, public[1], order))
        area = (points.sum(1) - (points[:, 0] + points[:, -1]) / 2) / 8
        assert area.mean() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("positive", [True, False])
def test_perturbed_logits(network, public, positive):
    order = pixel_order(full_size_map("synthetic"))
    images = torch.cat(list(perturbation_images(public[0], order, MEAN, STD, positive=positive)))
    logits = torch.stack([network(batch) for batch in images], dim=1)
    expected = REFERENCE[f"gap.synthetic.perturbation.{'positive' if positive else 'negative'}.logits"]
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-5, rtol=1e-4)
