"""Models with evidence blocks, unit keys and a preserved norm: forward pass, explanations, folders."""

import pytest
import torch
from transformers import Dinov2Config

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, explain
from modeling_castream.features_castream import extract
from modeling_castream.saliency_castream import explain_features
from tests.fresh_process import run_fresh
from tests.modeling_castream.tiny import tiny_convnext, tiny_resnet, tiny_timm

BACKBONES = {
    "resnet": lambda: tiny_resnet(),
    "convnext": lambda: tiny_convnext(),
    "timm": lambda: tiny_timm(),
    "dinov2": lambda: Dinov2Config(
        image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
    ),
}


def make_model(backbone: str = "resnet", **kwargs) -> CAStreamForImageClassification:
    torch.manual_seed(0)
    options = {"num_labels": 5, "variant": "final", "evidence_queries": ["memory", "constant"]} | kwargs
    if backbone == "dinov2":
        options["classifier_cls_token"] = True
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=BACKBONES[backbone](), **options)).eval()
    with torch.no_grad():
        for parameter in (*model.evidence.parameters(), *model.castream.stream.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_forward_pass_returns_a_map_that_sums_to_one_at_the_finer_resolution(backbone):
    model = make_model(backbone)
    evidence = model(images()).evidence_map
    assert evidence.shape == (2, 4, 4)  # stride 16 of 64 pixels
    torch.testing.assert_close(evidence.sum((1, 2)), torch.ones(2))
    side = 4 if backbone == "dinov2" else 2  # all depths of a transformer have its patches' resolution
    assert make_model(backbone, evidence_depths=1)(images()).evidence_map.shape == (2, side, side)


def test_without_a_block_there_is_no_map_and_no_weight():
    model = make_model(evidence_queries=None)
    assert model(images()).evidence_map is None
    assert not [name for name in model.state_dict() if "evidence" in name]
    with pytest.raises(ValueError, match="needs a model with an evidence block"):
        explain(model, images(), method="evidence")


def test_the_first_query_is_the_forward_pass_and_each_has_its_method():
    model = make_model()
    memory, constant = (explain(model, images(), method=name, upsample=False) for name in ("evidence", "object"))
    scaled = model(images()).evidence_map
    low, high = scaled.amin((1, 2), keepdim=True), scaled.amax((1, 2), keepdim=True)
    torch.testing.assert_close(memory, (scaled - low) / (high - low))
    assert (memory - constant).abs().max() > 0.05


def test_a_target_asks_for_that_classs_evidence_and_objects_are_no_classs():
    model, pixel_values = make_model(), images()
    own = explain(model, pixel_values, target=[1, 3], method="evidence")
    other = explain(model, pixel_values, target=[2, 3], method="evidence")
    torch.testing.assert_close(own[1], other[1])
    assert (own[0] - other[0]).abs().max() > 0.05
    several = explain(model, pixel_values, target=torch.tensor([[1, 2], [3, 3]]), method="evidence")
    torch.testing.assert_close(several[:, 0], own)
    torch.testing.assert_close(several[0, 1], other[0])
    objects = [explain(model, pixel_values, target=target, method="object") for target in (None, 1, 2)]
    torch.testing.assert_close(objects[0], objects[1])
    torch.testing.assert_close(objects[1], objects[2])


def test_items_of_a_batch_do_not_meet():
    model, pixel_values = make_model(unit_keys=True, preserve_norm=True), images(3)
    together = model(pixel_values)
    for item in range(3):
        alone = model(pixel_values[item : item + 1])
        torch.testing.assert_close(alone.evidence_map[0], together.evidence_map[item])
        torch.testing.assert_close(alone.logits[0], together.logits[item])


def test_bfloat16():
    model = make_model(unit_keys=True, preserve_norm=True)
    expected = model(images()).evidence_map
    found = model.to(torch.bfloat16)(images().to(torch.bfloat16))
    assert found.evidence_map.dtype == torch.float32 and found.logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.evidence_map, expected, rtol=0.1, atol=0.01)


def test_a_saved_model_answers_without_the_package(tmp_path):
    model = make_model(unit_keys=True, preserve_norm=True)
    model.save_pretrained(tmp_path / "model")
    torch.save({"pixel_values": images(), "evidence_map": model(images()).evidence_map}, tmp_path / "expected.pt")
    code = """
        import torch
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True)
        expected = torch.load("expected.pt")
        print(torch.equal(model(expected["pixel_values"]).evidence_map, expected["evidence_map"]))
    """
    assert run_fresh(code, tmp_path).split()[-1] == "True"


def test_a_preserved_norm_is_that_of_the_mean():
    model = make_model(unit_keys=True, preserve_norm=True)
    feature_maps, _ = model.castream.extract_features(images())
    pooled, _ = model.castream.pool_features(feature_maps, "ca")
    mean, _ = model.castream.pool_features(feature_maps, "gap")
    torch.testing.assert_close(pooled.norm(dim=1), mean.norm(dim=1))
    assert (pooled - mean).abs().max() > 1e-3


def test_unit_keys_attend_by_direction_alone():
    model = make_model(unit_keys=True)
    stream, feature_map = model.castream.stream, torch.rand(1, 32, 2, 2) + 0.1
    _, (attention,) = stream((feature_map,))
    _, (scaled,) = stream((feature_map * torch.tensor([[1.0, 2.0], [3.0, 4.0]]),))
    torch.testing.assert_close(attention, scaled)
    expected = torch.stack(
        [(stream.query[0] @ vector / vector.norm()) for vector in feature_map[0].flatten(1).T]
    ).softmax(0)
    torch.testing.assert_close(attention.flatten(), expected)


@pytest.mark.parametrize("backbone", ["resnet", "convnext"])
def test_grad_cam_is_the_mean_gradient_where_a_shift_moves_keys_and_length(backbone):
    model, target = make_model(backbone, unit_keys=True, preserve_norm=True), torch.tensor([1, 4])
    features = extract(model, images())
    leaf = features.feature_maps[-1].clone().requires_grad_()
    pooled, _ = model.castream.pool_features((leaf,), "ca")
    model.classify(pooled).gather(1, target[:, None]).sum().backward()
    expected = torch.einsum("bk,bkhw->bhw", leaf.grad.mean((2, 3)), leaf.detach())
    found = explain_features(features, target, "grad_cam", "ca", relu=False, normalize=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_attention_cam_adds_up_to_the_logit_with_a_preserved_norm():
    model, target = make_model(unit_keys=True, preserve_norm=True), torch.tensor([1, 4])
    features = extract(model, images())
    terms = explain_features(features, target, "attention_cam", "ca", relu=False, normalize=False)
    query, _ = model.castream.stream(features.feature_maps)
    ratio = features.feature_maps[-1].mean((2, 3)).norm(dim=1) / query.squeeze(1).norm(dim=1)
    projection = model.castream.stream.blocks[-1].projection
    constant = model.classifier.bias[target] + ratio * (model.classifier.weight[target] @ projection.bias)
    logits = model(images()).logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(terms.sum((1, 2)) + constant, logits)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"evidence_queries": ["image"]}, "evidence_queries must be out of memory, constant"),
        ({"evidence_depths": 3}, "evidence_depths must be 1 or 2, got 3"),
        ({"num_labels": 1, "evidence_queries": ["memory"]}, "at least two labels, got 1"),
        ({"query": "class_specific", "preserve_norm": True}, "preserve_norm=False"),
    ],
)
def test_what_cannot_be_is_refused(options, reason):
    with pytest.raises(Exception, match=reason):
        make_model(**options)
