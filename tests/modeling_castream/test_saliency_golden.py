"""Channel weights and maps against the research code's, for both of its models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TimmBackboneConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, explain, methods_castream
from modeling_castream.cam_castream import grad_cam_plus_plus_weights
from modeling_castream.features_castream import evaluating, pooled_direction, pooled_map_gradients
from modeling_castream.masking_castream import score_cam_weights
from modeling_castream.saliency_castream import explain_features, extract, upsample_maps
from tests.reference import formula

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "metrics_public.npz")
TARGET = torch.from_numpy(REFERENCE["labels"])
IMAGE = {"image_mean": formula.MEAN.ravel().tolist(), "image_std": formula.STD.ravel().tolist()}
POOLINGS = {"stream": "ca", "gap": "gap"}
METHODS = {"gradcam": "grad_cam", "gradcampp": "grad_cam_plus_plus", "scorecam": "score_cam"}
MAP_ATOL = {"gradcam": 5e-5, "gradcampp": 1e-5, "scorecam": 1e-5}  # Grad-CAM's terms cancel before the scaling
BLOCKS = ("base", "l1", "l2", "l3", "l4")


def reference_name(name: str) -> str:
    """timm's ResNet has the reference's names, but for the stream and the classifier."""
    name = name.removeprefix("castream.").removeprefix("backbone._backbone.").replace("classifier.", "fc.")
    if name.startswith("stream.blocks."):
        _, _, index, _, kind = name.split(".")
        return f"{BLOCKS[int(index)]}.to_out.1.{kind}"
    return name.replace("stream.query", "cls_token")


@pytest.fixture(scope="module")
def features():
    config = CAStreamConfig(
        backbone_config=TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4]),
        stream_layers=["_backbone.maxpool", "layer1", "layer2", "layer3", "layer4"],
        stream_channels=[64, 64, 128, 256, 512],
        num_labels=10,
    )
    model = CAStreamForImageClassification(config).eval()
    weights = {
        name: torch.from_numpy(formula.formula_array(reference_name(name), tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    return extract(model, torch.from_numpy(formula.images("metrics_public")[1]))


@pytest.fixture(scope="module")
def score_cam(features):
    """Weights and maps for both models, of one pass over the masked images."""
    weights = {}

    def spy(*args, **kwargs):
        weights.update(score_cam_weights(*args, **kwargs))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods_castream, "score_cam_weights", spy)
        maps = explain_features(features, TARGET, "score_cam", tuple(POOLINGS.values()), **IMAGE)
    return weights, maps


@pytest.fixture
def coefficients(features, score_cam, name, method):
    with evaluating(features.model):
        if method == "gradcam":
            return pooled_direction(features, TARGET, POOLINGS[name]) / 4  # four positions
        if method == "gradcampp":
            gradients = pooled_map_gradients(features, TARGET, POOLINGS[name])
            return grad_cam_plus_plus_weights(features.feature_maps[-1], gradients)
        return score_cam[0][POOLINGS[name]]


def assert_matches(actual, name, atol):
    torch.testing.assert_close(actual.detach(), torch.from_numpy(REFERENCE[name]), atol=atol, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_logits(features, name):
    assert_matches(features.logits(POOLINGS[name]), f"{name}.logits", 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", POOLINGS)
def test_coefficients(coefficients, name, method):
    assert_matches(coefficients, f"{name}.{method}.coefficients", 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_maps(features, score_cam, method):
    maps = score_cam[1]
    if method != "scorecam":
        maps = explain_features(features, TARGET, METHODS[method], tuple(POOLINGS.values()))
    for name, pooling in POOLINGS.items():
        assert_matches(maps[pooling], f"{name}.{method}.map", MAP_ATOL[method])


def test_upsampled_map(features):
    maps = explain_features(features, TARGET, "grad_cam", "ca")
    assert_matches(upsample_maps(maps, (64, 64))[:1], "stream.gradcam.upsampled", 5e-5)
    whole = explain(features.model, features.pixel_values, TARGET, "grad_cam", "ca")
    assert torch.equal(whole, upsample_maps(maps, (64, 64)))
