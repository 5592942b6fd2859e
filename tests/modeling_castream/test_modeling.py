"""Behaviour of the models: poolings, freezing, losses, precision, input checks."""

import math

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, CAStreamModel
from tests.modeling_castream.tiny import CONFIGS, tiny_model, tiny_resnet

KINDS = sorted(set(CONFIGS) - {"vit"})  # which takes images of one size only, and averages nothing


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", ["stream", "final"])
@pytest.mark.parametrize("output_projection", [True, False])
@pytest.mark.parametrize("kind", ["resnet", "convnext", "timm", "neck"])
def test_gap_init_equals_gap(kind, variant, output_projection):
    model = tiny_model(kind, trained=False, variant=variant, output_projection=output_projection)
    pixel_values = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        ca, gap = model(pixel_values), model(pixel_values, pooling="gap")
    assert gap.logits.std() > 1e-3
    torch.testing.assert_close(ca.logits, gap.logits, atol=1e-5, rtol=0)


def test_gap_init_lets_every_parameter_of_the_stream_move():
    model = tiny_model(trained=False).train()
    optimizer = torch.optim.SGD(model.castream.stream.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in model.castream.stream.named_parameters()}
    for _ in range(len(model.castream.stream.blocks) + 1):  # the gradient reaches one block further a step
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    for name, parameter in model.castream.stream.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_reference_init():
    stream = CAStreamModel(CAStreamConfig(backbone_config=ResNetConfig(), init="reference")).stream
    query, weight = stream.query.detach(), stream.blocks[-1].projection.weight.detach()
    assert query.mean() == pytest.approx(1, abs=0.5) and query.std() == pytest.approx(1, abs=0.3)
    bound = math.sqrt(6 / (2048 + 2048))  # Xavier-uniform
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_output_shapes_and_attention(kind):
    model = tiny_model(kind)
    pixel_values = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        out = model(pixel_values, output_hidden_states=True)
    assert out.loss is None and out.logits.shape == (3, 5)
    assert len(out.attention_maps) == len(model.config.stream_layers) == len(out.hidden_states)
    for attention, feature_map in zip(out.attention_maps, out.hidden_states, strict=True):
        assert attention.shape == (3, 1, *feature_map.shape[2:])
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(3, 1))
        assert attention.std() > 0


def test_gap_returns_attention_maps_too():
    model = tiny_model()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ca, gap = model(pixel_values), model(pixel_values, pooling="gap")
    assert not torch.allclose(ca.logits, gap.logits)
    for a, b in zip(ca.attention_maps, gap.attention_maps, strict=True):
        assert torch.equal(a, b)


def test_config_pooling_is_the_default_of_a_call():
    model = tiny_model(pooling="gap")
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, model(pixel_values, pooling="gap").logits)
        assert not torch.equal(model(pixel_values).logits, model(pixel_values, pooling="ca").logits)


def test_heads():
    model = tiny_model(num_attention_heads=4)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 64, 64))
    assert all(attention.shape[1] == 4 for attention in out.attention_maps)
    for attention in out.attention_maps:
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["ca", "gap"])
def test_a_batch_equals_its_items(kind, pooling):
    model = tiny_model(kind)
    pixel_values = torch.randn(3, 3, 64, 48)
    with torch.no_grad():
        batch = model(pixel_values, pooling=pooling)
        singles = [model(item[None], pooling=pooling) for item in pixel_values]
    torch.testing.assert_close(batch.logits, torch.cat([s.logits for s in singles]), atol=1e-5, rtol=1e-5)
    for index, attention in enumerate(batch.attention_maps):
        singly = torch.cat([s.attention_maps[index] for s in singles])
        torch.testing.assert_close(attention, singly, atol=1e-6, rtol=1e-4)


def test_gap_is_the_transformers_classifier():
    source = ResNetForImageClassification(ResNetConfig(**tiny_resnet().to_dict() | {"num_labels": 5})).eval()
    model = tiny_model("resnet")
    model.castream.backbone.load_state_dict(
        {k.removeprefix("resnet."): v for k, v in source.state_dict().items() if k.startswith("resnet.")}
    )
    model.classifier.load_state_dict({k: v for k, v in source.classifier[1].state_dict().items()})
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(pixel_values, pooling="gap").logits, source(pixel_values).logits, atol=1e-6, rtol=0
        )


def test_class_specific_queries_read_their_own_token():
    model = tiny_model(query="class_specific")
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model(pixel_values)
        tokens = model.castream(pixel_values).pooler_output
    assert tokens.shape == (2, 5, 32) and out.attention_maps[-1].shape == (2, 5, 2, 2)
    for label in range(5):
        torch.testing.assert_close(out.logits[:, label], model.classifier(tokens[:, label])[:, label])


def frozen_state(model):
    frozen = [*model.castream.backbone.named_parameters(), *model.castream.neck.named_parameters()]
    return {name: tensor.clone() for name, tensor in [*frozen, *model.castream.backbone.named_buffers()]}


@pytest.mark.parametrize("kind", ["neck", "timm"])
def test_the_backbone_stays_frozen(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    model = CAStreamForImageClassification.from_pretrained(tmp_path).train()
    before = frozen_state(model)
    assert not model.castream.backbone.training and not model.castream.neck.training
    assert model.castream.stream.training and model.classifier.training
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in trainable if not name.startswith("castream.stream.")} == {"classifier"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 64, 64), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    optimizer.step()
    after = frozen_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_freezing_is_a_choice():
    free = tiny_model(freeze_backbone=False).train()
    assert free.castream.backbone.training and all(p.requires_grad for p in free.parameters())
    closed = tiny_model("convnext", freeze_classifier=True).train()
    assert {name.split(".")[1] for name, p in closed.named_parameters() if p.requires_grad} == {"stream"}


def test_gradients_are_the_caller_s_once_the_model_is_loaded(tmp_path):
    """Frozen when built and when loaded, by either road; neither mode takes back what a user has unfrozen since."""
    built = tiny_model()
    built.save_pretrained(tmp_path)
    loaded, report = CAStreamForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for model in (built, loaded, CAStreamForImageClassification.from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in model.castream.backbone.parameters())
        assert all(parameter.requires_grad for parameter in model.castream.stream.parameters())
        model.castream.backbone.requires_grad_(True)
        model.classifier.requires_grad_(False)
        for mode in (True, False):
            model.train(mode)
            assert not any(module.training for module in model.castream.backbone.modules())
            assert all(parameter.requires_grad for parameter in model.castream.backbone.parameters())
            assert not model.classifier.weight.requires_grad
    base = CAStreamModel.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in base.backbone.parameters())


def test_single_and_multi_label_losses():
    model = tiny_model()
    pixel_values = torch.randn(2, 3, 64, 64)
    out = model(pixel_values, labels=torch.tensor([1, 3]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 3])))

    model = tiny_model(problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    out = model(pixel_values, labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)


def test_bf16_autocast():
    model = tiny_model()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(pixel_values)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pixel_values)
    torch.testing.assert_close(out.logits.float(), exact.logits, atol=0.05, rtol=0.05)
    for attention in out.attention_maps:
        torch.testing.assert_close(attention.float().sum((2, 3)), torch.ones(2, 1), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (3, 64, 64), (2, 4, 64, 64)])
def test_wrong_input_is_named(shape):
    with pytest.raises(ValueError, match=r"pixel_values must have the shape \(batch_size, 3, height, width\), got"):
        tiny_model()(torch.randn(shape))


def test_missing_input_and_unknown_pooling_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="pixel_values must have the shape"):
        model()
    with pytest.raises(ValueError, match="pooling must be one of ca, gap"):
        model(torch.randn(1, 3, 64, 64), pooling="max")


def test_tuple_output():
    model = tiny_model()
    logits, attention_maps = model(torch.randn(1, 3, 64, 64), return_dict=False)
    assert logits.shape == (1, 5) and len(attention_maps) == 5


# Counts published for the authors' networks, 1000 classes.
@pytest.mark.parametrize(
    ("options", "total", "added"),
    [
        ({"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}, 12_129_320, 439_808),
        ({}, 32_526_184, 6_969_152),
    ],
    ids=["resnet18", "resnet50"],
)
def test_parameter_counts(options, total, added):
    with torch.device("meta"):
        model = CAStreamForImageClassification(CAStreamConfig(backbone_config=ResNetConfig(**options), num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.castream.stream.parameters()) == added


def with_problem(problem_type: str | None, num_labels: int) -> CAStreamForImageClassification:
    config = CAStreamConfig(backbone_config=tiny_resnet(), num_labels=num_labels, problem_type=problem_type)
    return CAStreamForImageClassification(config)


def test_probabilities_follow_the_kind_of_problem():
    """Softmax over classes, each class's own sigmoid for several labels, transformers' sigmoid for a single logit."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(with_problem(None, 2).probabilities(logits), torch.tensor([[0.25, 0.75]]))
    several = with_problem("multi_label_classification", 2)
    torch.testing.assert_close(several.probabilities(logits), torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(with_problem(None, 1).probabilities(logits[:, 1:]), torch.tensor([[0.75]]))
    with pytest.raises(ValueError, match="regression"):
        with_problem("regression", 2).probabilities(logits)


def test_average_pooling_does_not_run_the_stream(monkeypatch):
    model = with_problem(None, 3).eval()
    feature_maps, _ = model.castream.extract_features(torch.randn(1, 3, 32, 32))
    monkeypatch.setattr(model.castream.stream, "forward", None)  # calling it raises
    pooled, attention_maps = model.castream.pool_features(feature_maps, "gap")
    torch.testing.assert_close(pooled, feature_maps[-1].mean((2, 3)))
    assert attention_maps == ()


def test_a_forward_pass_gives_attention_maps_under_either_pooling():
    model, pixel_values = with_problem(None, 3).eval(), torch.randn(1, 3, 64, 64)
    maps = {pooling: model(pixel_values, pooling=pooling).attention_maps for pooling in ("ca", "gap")}
    assert len(maps["gap"]) == len(model.config.stream_layers)
    for under_ca, under_gap in zip(maps["ca"], maps["gap"], strict=True):
        torch.testing.assert_close(under_ca, under_gap)
