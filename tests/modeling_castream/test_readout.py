"""Where a classifier reads the pooled vector itself, its weights are the gradient: nothing has to be differentiated."""

import pytest
import torch
from transformers import LevitConfig, MobileNetV2Config, RegNetConfig, SwiftFormerConfig, TimmWrapperConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, explain

TRANSFORMERS = {
    "regnet": lambda: RegNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, groups_width=8),
    "mobilenet_v2": lambda: MobileNetV2Config(depth_multiplier=0.35, finegrained_output=False),
    "levit": lambda: LevitConfig(
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1] * 3,
        architectures=["LevitForImageClassification"],
    ),
    "swiftformer": lambda: SwiftFormerConfig(depths=[1] * 4, embed_dims=[8, 16, 24, 32]),
}


def classifier(name: str) -> CAStreamForImageClassification:
    """A whole classifier with random weights and a random stream, in eval mode."""
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        options = {"backbone_config": TRANSFORMERS[name](), "whole_classifier": True}
    else:
        options = {"backbone_config": TimmWrapperConfig(architecture=name)}
    model = CAStreamForImageClassification(CAStreamConfig(**options, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in (*model.castream.stream.parameters(), *model.classifier.parameters()):
            parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        *[("resnet10t", True), ("tf_efficientnet_lite0", True), ("regnet", True), ("mobilenet_v2", True)],
        *[("convnext_atto", False), ("levit", False)],
    ],
)
def test_a_readout_that_hands_on_the_pooled_vector_is_found(name, linear, monkeypatch):
    model = classifier(name)
    assert model.has_linear_readout is linear
    side = 224 if name == "levit" else 64
    pixel_values = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    options = {"target": torch.tensor([1, 3]), "normalize": False, "relu": False}
    maps = {pooling: explain(model, pixel_values, pooling=pooling, **options) for pooling in ("ca", "gap")}
    monkeypatch.setattr(CAStreamForImageClassification, "has_linear_readout", False)  # now autograd says it
    for pooling, ours in maps.items():
        expected = explain(model, pixel_values, pooling=pooling, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_several_classifiers_have_no_linear_readout():
    model = classifier("swiftformer")
    assert not hasattr(model.classifier, "weight")
    assert explain(model, torch.randn(1, 3, 64, 64), target=1).isfinite().all()
