"""explain(): its maps against plain autograd and plain loops, and what it promises of batches, modes and bad input."""

import gc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BatchFeature, BitImageProcessor, Dinov2Config, SwinConfig

from modeling_castream import (
    CAStreamConfig,
    CAStreamForImageClassification,
    explain,
    masking_castream,
    methods_castream,
)
from modeling_castream.folding_castream import folding
from modeling_castream.masking_castream import ablation_cam_weights
from modeling_castream.methods_castream import Method
from modeling_castream.saliency_castream import empty_maps, explain_features, extract
from tests.modeling_castream.tiny import METHODS, tiny_model, tiny_resnet

RAW = {"relu": False, "normalize": False, "upsample": False}
POOLINGS = ("ca", "gap")
GRADIENT_METHODS = {
    "grad_cam": lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1),
    "cosine_cam": lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1) / a.norm(dim=1),
    "hires_cam": lambda a, g: (g * a).sum(1),
    "layer_cam": lambda a, g: (g.relu() * a).sum(1),
}


def tiny_swin(**kwargs):
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4)
    return randomized(CAStreamForImageClassification(CAStreamConfig(backbone_config=backbone, num_labels=5, **kwargs)))


def tiny_dinov2(**kwargs):
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, out_features=["stage1", "stage2"]
    )
    config = CAStreamConfig(backbone_config=backbone, num_labels=5, classifier_cls_token=True, **kwargs)
    return randomized(CAStreamForImageClassification(config))


def randomized(model):
    """Weights far from initialisation, where many terms are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (model.castream.stream, model.classifier, model.head):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
        for name, parameter in model.castream.backbone.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.5)  # ConvNeXt's 1e-6 hides what a block does
    return model.eval()


MODELS = {
    "resnet": lambda: randomized(tiny_model("resnet")),
    "convnext": lambda: randomized(tiny_model("convnext")),  # a layer norm between pooling and classifier
    "timm": lambda: randomized(tiny_model("timm")),
    "neck": lambda: randomized(tiny_model("neck")),
    "swin": tiny_swin,
    "dinov2": tiny_dinov2,  # the classifier reads the CLS token as well
    "heads": lambda: randomized(tiny_model("resnet", num_attention_heads=2)),
    "no_projection": lambda: randomized(tiny_model("resnet", output_projection=False)),
    "class_specific": lambda: randomized(tiny_model("resnet", query="class_specific")),
    "final": lambda: randomized(tiny_model("convnext", variant="final")),
}
TARGET = torch.tensor([1, 2, 1])  # maps that are not zero


def pixels(kind="resnet", batch_size=3, seed=0):
    size = {"swin": (64, 64), "dinov2": (56, 84)}.get(kind, (64, 96))
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(seed))


def autograd_maps_and_gradients(model, pixel_values, target, pooling, layer):
    """The feature map and its gradient, of the model's own forward and backward pass."""
    out = model(pixel_values.clone().requires_grad_(), pooling=pooling, output_hidden_states=True)
    feature_map = out.hidden_states[layer]
    feature_map.retain_grad()
    out.logits[range(len(target)), target].sum().backward()
    model.zero_grad()
    return feature_map.detach(), feature_map.grad


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_methods_at_the_pooled_map_against_autograd(kind, pooling, method):
    model, pixel_values = MODELS[kind](), pixels(kind)
    feature_map, gradients = autograd_maps_and_gradients(model, pixel_values, TARGET, pooling, -1)
    expected = GRADIENT_METHODS[method](feature_map, gradients)
    maps = explain(model, pixel_values, TARGET, method, pooling, **RAW)
    assert expected.abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["resnet", "convnext", "timm", "neck"])
def test_gradient_methods_at_an_inner_map_against_autograd(kind, pooling):
    model, pixel_values = MODELS[kind](), pixels(kind)
    for layer in range(len(model.config.stream_layers) - 1):
        feature_map, gradients = autograd_maps_and_gradients(model, pixel_values, TARGET, pooling, layer)
        expected = GRADIENT_METHODS["layer_cam"](feature_map, gradients)
        scale = expected.abs().max()
        maps = explain(model, pixel_values, TARGET, "layer_cam", pooling, layer=layer, **RAW)
        assert scale > 1e-5
        torch.testing.assert_close(maps / scale, expected / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_inner_map_that_the_backbone_returns_rearranged(pooling):
    """Swin goes on with tokens and returns a transposed copy: the gradient is the tokens'."""
    model, pixel_values = MODELS["swin"](), pixels("swin")
    tokens = []
    block = model.castream.backbone.swin.encoder.layers[0].blocks[-1]
    handle = block.register_forward_hook(lambda module, args, output: tokens.append(output))
    out = model(pixel_values.clone().requires_grad_(), pooling=pooling, output_hidden_states=True)
    handle.remove()
    tokens = tokens[0][0] if isinstance(tokens[0], tuple) else tokens[0]
    height, width = out.hidden_states[1].shape[2:]
    feature_map = tokens.transpose(1, 2).unflatten(2, (height, width)).detach()
    assert torch.equal(feature_map, out.hidden_states[1])
    (gradients,) = torch.autograd.grad(out.logits[range(3), TARGET].sum(), tokens)
    gradients = gradients.transpose(1, 2).unflatten(2, (height, width))
    maps = explain(model, pixel_values, TARGET, "hires_cam", pooling, layer="stage1", **RAW)
    torch.testing.assert_close(maps, (gradients * feature_map).sum(1), atol=1e-6, rtol=1e-3)


def test_an_inner_map_off_the_backbones_path_is_an_error():
    """DINOv2 returns normed maps, which none of its later layers reads."""
    with pytest.raises(ValueError, match=r"'stage1' has no gradient"):
        explain(MODELS["dinov2"](), pixels("dinov2"), method="grad_cam", layer=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("convnext", "final")])  # a linear head
def test_attention_cam_adds_up_to_the_logit(kind, pooling):
    model, pixel_values = MODELS[kind](), pixels(kind)
    terms = explain(model, pixel_values, TARGET, "attention_cam", pooling, **RAW).sum((1, 2))
    features = extract(model, pixel_values)
    constant = model.classifier.bias[TARGET]
    if features.cls_token is not None:
        constant = constant + (features.cls_token * model.classifier.weight[TARGET, :16]).sum(1)
    projection = model.castream.stream.blocks[-1].projection
    if pooling == "ca" and hasattr(projection, "bias"):
        constant = constant + model.classifier.weight[TARGET][:, -len(projection.bias) :] @ projection.bias
    logits = features.logits(pooling)[range(3), TARGET]
    assert terms.abs().min() > 1e-3
    torch.testing.assert_close(terms + constant, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_attention_cam_of_a_nonlinear_head_adds_up_to_its_linearization(pooling):
    model, pixel_values = MODELS["convnext"](), pixels()
    model.castream.stream.blocks[-1].projection.bias.data.zero_()
    terms = explain(model, pixel_values, TARGET, "attention_cam", pooling, **RAW).sum((1, 2))
    pooled = extract(model, pixel_values).pool(pooling).pooler_output.requires_grad_()
    (gradients,) = torch.autograd.grad(model.classify(pooled)[range(3), TARGET].sum(), pooled)
    torch.testing.assert_close(terms, (gradients * pooled).sum(1), atol=1e-5, rtol=1e-4)


def test_raw_attention_is_the_models_own():
    model, pixel_values = MODELS["heads"](), pixels()
    with torch.no_grad():
        attention_maps = model(pixel_values).attention_maps
    for layer, attention in enumerate(attention_maps):
        maps = explain(model, pixel_values, method="raw_attention", layer=layer, **RAW)
        torch.testing.assert_close(maps, attention.mean(1))


def test_raw_attention_of_class_specific_queries_is_the_targets():
    model, pixel_values = MODELS["class_specific"](), pixels()
    with torch.no_grad(), folding():  # as explanations run it, to the bit
        attention = model(pixel_values.contiguous(memory_format=torch.channels_last)).attention_maps[1]
    maps = explain(model, pixel_values, TARGET, "raw_attention", layer=1, **RAW)
    assert torch.equal(maps, attention[range(3), TARGET])


@pytest.mark.parametrize("kind", ["heads", "convnext", "class_specific", "dinov2"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ablation_cam_against_pooling_each_ablated_map(kind, pooling):
    model, pixel_values = MODELS[kind](), pixels(kind, batch_size=2)
    features, target = extract(model, pixel_values), TARGET[:2]
    feature_map = features.feature_maps[-1]
    score = features.logits(pooling)[range(2), target]
    expected = torch.zeros(2, *feature_map.shape[2:])
    for channel in range(feature_map.shape[1]):
        ablated = feature_map.clone()
        ablated[:, channel] = 0
        with torch.no_grad():
            pooled, _ = model.castream.pool_features((*features.feature_maps[:-1], ablated), pooling)
            without = model.classify(pooled, features.cls_token)[range(2), target]
        expected += ((score - without) / score.abs())[:, None, None] * feature_map[:, channel]
    maps = explain(model, pixel_values, target, "ablation_cam", pooling, **RAW)
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-3)


def score_cam_by_loops(model, pixel_values, target, pooling, layer, mean, std):
    """Channel by channel, in the space where `mean` and `std` put the image."""
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    feature_map = extract(model, pixel_values).feature_maps[layer]
    maps = torch.zeros(len(pixel_values), *feature_map.shape[2:])
    for item, image in enumerate(pixel_values * std + mean):
        for channel in feature_map[item]:
            mask = F.interpolate(channel[None, None], image.shape[1:], mode="bilinear", align_corners=True)[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 2.2e-16)
            with torch.no_grad():
                logits = model(((image * mask - mean) / std)[None], pooling=pooling).logits
            maps[item] += logits.softmax(-1)[0, target[item]] * channel
    return maps


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("kind", ["neck", "convnext"])  # ReLU6, with dead channels, and signed features
def test_score_cam_against_loops(kind, layer, scaled):
    model, pixel_values = MODELS[kind](), pixels(batch_size=2)
    mean, std = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]) if scaled else ([0.0] * 3, [1.0] * 3)
    options = {"image_mean": mean, "image_std": std} if scaled else {}
    expected = {
        pooling: score_cam_by_loops(model, pixel_values, TARGET, pooling, layer, mean, std) for pooling in POOLINGS
    }
    maps = explain_features(
        extract(model, pixel_values),
        TARGET[:2],
        "score_cam",
        POOLINGS,
        layer=layer,
        relu=False,
        normalize=False,
        **options,
    )
    for pooling in POOLINGS:
        torch.testing.assert_close(maps[pooling], expected[pooling], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(maps["ca"], maps["gap"], atol=1e-3)


def test_score_cam_passes_constant_channels_and_poolings_once(monkeypatch):
    model, pixel_values = MODELS["convnext"](), pixels(batch_size=2)
    features = extract(model, pixel_values)
    feature_map = features.feature_maps[-1]
    feature_map[0, :5] = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0])[:, None, None]
    passed = []
    run = model.castream.extract_features
    monkeypatch.setattr(model.castream, "extract_features", lambda images: passed.append(len(images)) or run(images))
    options = {"relu": False, "normalize": False, "chunk_size": 7}
    together = explain_features(features, TARGET[:2], "score_cam", POOLINGS, **options)
    assert sum(passed) == feature_map[:, :, 0, 0].numel() - 5 + 1  # one black image for the five
    assert max(passed) == 7
    with torch.no_grad():
        black = model(torch.zeros(1, 3, 64, 96), pooling="ca").logits.softmax(-1)[0, TARGET[0]]
    alone = extract(model, pixel_values)
    alone.feature_maps[-1][0, :5] = 0
    without = explain_features(alone, TARGET[:2], "score_cam", "ca", **options)
    shift = black * (1.0 - 2.0 + 0.5)
    torch.testing.assert_close(together["ca"][0] - without[0], shift.expand(without[0].shape), atol=1e-5, rtol=0)


def test_score_cam_makes_its_masked_images_in_the_layout_of_the_backbone(monkeypatch):
    """No copy is made of them on their way."""
    laid, run = [], masking_castream.run_backbone

    def note(model, images, dtype):
        laid.append(images.is_contiguous(memory_format=torch.channels_last))
        return run(model, images, dtype)

    features = extract(MODELS["resnet"](), pixels().contiguous())
    monkeypatch.setattr(masking_castream, "run_backbone", note)
    explain_features(features, TARGET, "score_cam", chunk_size=7, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    assert len(laid) > 3 and sum(laid) >= len(laid) - 1  # all but the one black image for constant channels


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_map_of_one_position_has_nothing_to_show(method, pooling):
    """32 pixels at stride 32: every channel is constant, so that there is nothing to mask or to leave out."""
    model, pixel_values = MODELS["resnet"](), pixels()[:, :, :32, :32]
    with pytest.warns(UserWarning, match=f"3 of 3 {method} maps are flat"):
        maps = explain(model, pixel_values, TARGET, method, pooling)
    assert maps.shape == (3, 32, 32) and not maps.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_leaving_out_channels_of_zeros_changes_nothing(pooling):
    features = extract(MODELS["resnet"](), pixels())
    features.feature_maps = (*features.feature_maps[:-1], torch.zeros_like(features.feature_maps[-1]))
    assert not ablation_cam_weights(features, TARGET, pooling).any()


@pytest.mark.parametrize("method", ["score_cam", "ablation_cam"])
def test_chunk_size_changes_nothing(method):
    model, pixel_values = MODELS["resnet"](), pixels()
    maps = [explain(model, pixel_values, TARGET, method, chunk_size=size) for size in (1, 5, 1000, None)]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_singles(method):
    model, pixel_values = MODELS["resnet"](), pixels()
    together = explain(model, pixel_values, TARGET, method)
    assert together.shape == (3, 64, 96) and together.dtype == torch.float32 and not together.requires_grad
    assert together.min() >= 0 and together.max() <= 1
    for item in range(3):
        single = explain(model, pixel_values[item : item + 1], int(TARGET[item]), method)
        torch.testing.assert_close(single[0], together[item], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_item_does_not_touch_its_neighbours(method):
    model, pixel_values = MODELS["resnet"](), pixels()
    clean = explain(model, pixel_values, TARGET, method)
    broken = pixel_values.clone()
    broken[1, 0, 5, 5] = torch.nan
    with pytest.warns(UserWarning, match=f"1 of 3 {method} maps"):
        maps = explain(model, broken, TARGET, method)
    assert torch.equal(maps[1], torch.zeros_like(maps[1]))
    torch.testing.assert_close(maps[::2], clean[::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["grad_cam", "cosine_cam"])
def test_a_given_class_costs_no_pass_through_the_stream(method, monkeypatch):
    model, pixel_values = MODELS["resnet"](), pixels()
    expected = explain(model, pixel_values, TARGET, method)

    def refuse(*args):
        raise AssertionError("the stream ran")

    monkeypatch.setattr(model.castream.stream, "forward", refuse)
    assert torch.equal(explain(model, pixel_values, TARGET, method), expected)
    with pytest.raises(AssertionError, match="the stream ran"):
        explain(model, pixel_values, None, method)  # which class is predicted, only the logits say


def test_flat_and_negative_maps_are_zero_and_counted():
    model, pixel_values = tiny_model(trained=False), pixels()
    with pytest.warns(UserWarning, match="3 of 3 raw_attention maps"):  # an untrained stream attends evenly
        maps = explain(model, pixel_values, method="raw_attention")
    assert torch.equal(maps, torch.zeros_like(maps))
    with torch.no_grad():
        model.classifier.weight.fill_(-1)  # every contribution is negative: the features are positive
    maps = explain_features(extract(model, pixel_values), 0, "grad_cam")
    assert empty_maps(maps).tolist() == [True] * 3
    raw = explain(model, pixel_values, 0, "grad_cam", relu=False)
    assert raw.amax((1, 2)).min() > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_target_none_is_the_predicted_class_of_each_pooling(method):
    model, pixel_values = MODELS["neck"](), pixels(seed=3)
    for pooling in POOLINGS:
        with torch.no_grad():
            predicted = model(pixel_values, pooling=pooling).logits.argmax(-1)
        expected = explain(model, pixel_values, predicted, method, pooling)
        assert torch.equal(explain(model, pixel_values, None, method, pooling), expected)


def test_targets_in_all_their_forms():
    model, pixel_values = MODELS["resnet"](), pixels()
    expected = explain(model, pixel_values, TARGET)
    model.config.label2id = {"cat": 1, "dog": 2}
    for target in (TARGET.tolist(), TARGET.int(), TARGET.numpy(), ["cat", 2, "cat"], ("cat", "dog", "cat")):
        assert torch.equal(explain(model, pixel_values, target), expected)
    for target in (1, "cat", torch.tensor(1), TARGET.numpy()[0]):
        assert torch.equal(explain(model, pixel_values, target)[0], expected[0])


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_per_image(method):
    model, pixel_values = MODELS["neck"](), pixels()
    several = torch.stack([TARGET, torch.tensor([3, 1, 2])], dim=1)
    maps = explain(model, pixel_values, several, method)
    assert maps.shape == (3, 2, 64, 96)
    for column in range(2):
        torch.testing.assert_close(maps[:, column], explain(model, pixel_values, several[:, column], method))


def test_select_repeats_items_without_a_pass():
    model, pixel_values = MODELS["dinov2"](), pixels("dinov2")
    features = extract(model, pixel_values)
    maps = explain_features(features.select(torch.tensor([2, 0, 2])), [1, 0, 4], "grad_cam")
    assert torch.equal(maps[:1], explain_features(features, 1, "grad_cam")[2:])
    assert torch.equal(maps[1:2], explain_features(features, 0, "grad_cam")[:1])


def test_all_layers():
    model, pixel_values = MODELS["resnet"](), pixels()
    maps = explain(model, pixel_values, TARGET, "raw_attention", layer="all")
    assert maps.shape == (3, len(model.config.stream_layers), 64, 96)
    assert torch.equal(maps[:, 1], explain(model, pixel_values, TARGET, "raw_attention", layer="stage1"))
    assert explain(model, pixel_values, layer="all", method="layer_cam").shape == maps.shape


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_hundred_calls_leave_nothing_behind(frozen):
    model, pixel_values = tiny_model(freeze_backbone=frozen), pixels(batch_size=1)
    methods = [method for method in METHODS if method not in ("score_cam", "ablation_cam")]
    hooked = hooks(model)

    def tensors():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the registry of warnings given holds their text
        explain(model, pixel_values)
        before = tensors()
        for call in range(100):
            explain(
                model, pixel_values, 0, methods[call % len(methods)], POOLINGS[call % 2], layer=(-1, 1)[call % 20 == 5]
            )
        for method in ("score_cam", "ablation_cam"):
            explain(model, pixel_values, 0, method)
    assert tensors() == before and hooks(model) == hooked
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_modes_flags_and_statistics_stay(method):
    model, pixel_values = tiny_model(freeze_backbone=False).train(), pixels()
    model.castream.backbone.encoder.stages[1].eval()
    model.classifier.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given = pixel_values.clone()
    maps = explain(model, pixel_values, TARGET, method)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(pixel_values, given) and torch.is_grad_enabled()
    assert torch.equal(maps, explain(model.eval(), pixel_values, TARGET, method))  # as in eval mode


def test_modes_are_put_back_after_an_error():
    model = tiny_model(freeze_backbone=False).train()
    with pytest.raises(ValueError, match="pixel_values"):
        explain(model, torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="target"):
        explain(model, pixels(), 99)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_contexts_change_nothing(context, layer):
    model, pixel_values = MODELS["resnet"](), pixels()
    for method in ("grad_cam", "hires_cam", "raw_attention", "score_cam"):
        expected = explain(model, pixel_values, TARGET, method, layer=layer)
        with context():
            given = pixel_values.clone()  # within inference mode a tensor that autograd refuses
            assert torch.equal(explain(model, given, TARGET, method, layer=layer), expected)
        assert torch.equal(explain(model, given, TARGET, method, layer=layer), expected)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    model, pixel_values = MODELS["neck"](), pixels()
    expected = explain(model, pixel_values, TARGET, method)
    with torch.autocast("cpu", torch.bfloat16):
        maps = explain(model, pixel_values, TARGET, method)
        assert torch.is_autocast_enabled("cpu")
    assert maps.dtype == torch.float32 and not torch.equal(maps, expected)
    correlation = torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_model(method):
    model, pixel_values = MODELS["neck"](), pixels()
    expected = explain(model, pixel_values, TARGET, method)
    maps = explain(model.to(torch.bfloat16), pixel_values, TARGET, method)
    assert maps.dtype == torch.float32
    assert torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "layer_cam", "xgrad_cam"])
def test_autocast_at_inner_layers(method):
    model, pixel_values = MODELS["resnet"](), pixels()
    expected = explain(model, pixel_values, TARGET, method, layer=1)
    with torch.autocast("cpu", torch.bfloat16):
        maps = explain(model, pixel_values, TARGET, method, layer=1)
    assert maps.dtype == torch.float32 and not torch.equal(maps, expected)
    assert torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.95


def test_score_cam_in_bfloat16():
    model, pixel_values = MODELS["neck"](), pixels()
    expected = explain(model, pixel_values, TARGET, "score_cam")
    maps = explain(model, pixel_values, TARGET, "score_cam", autocast_dtype=torch.bfloat16)
    assert not torch.equal(maps, expected)
    torch.testing.assert_close(maps, expected, atol=0.05, rtol=0)


def test_compiled_model():
    model, pixel_values = MODELS["resnet"](), pixels()
    expected = {method: explain(model, pixel_values, TARGET, method) for method in ("grad_cam", "layer_cam")}
    compiled = torch.compile(model, backend="aot_eager")
    compiled(pixel_values)
    model.castream.backbone.compile(backend="aot_eager")
    for method, maps in expected.items():
        torch.testing.assert_close(explain(compiled, pixel_values, TARGET, method), maps, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method must be one of raw_attention, .*'gradcam'"),
        ({"pooling": "max"}, "pooling must be one of .*'max'"),
        ({"layer": "stage9"}, "layer must be one of stem, stage1.*'stage9'"),
        ({"layer": 5}, "layer must be one of .*got 5"),
        ({"layer": 1.5}, "layer must be one of .*got 1.5"),
        ({"layer": 0, "method": "attention_cam"}, "'attention_cam' explains the pooled feature map only"),
        ({"layer": 0, "method": "ablation_cam"}, "'ablation_cam' explains the pooled feature map only"),
        ({"layer": "all", "upsample": False}, "layer='all' needs upsample=True"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"target": 5}, r"target must hold class ids from 0 to 4, got \[5"),
        ({"target": [0, -1, 2]}, r"target must hold class ids from 0 to 4, got \[-1\]"),
        ({"target": [0, 1]}, "one class per image, got 2 for 3"),
        ({"target": "zebra"}, "a label of the model .*'zebra'"),
        ({"target": 1.0}, "a class id or a label of the model, got 1.0"),
        ({"target": torch.rand(3)}, "target must hold class ids, got torch.float32"),
        ({"method": "score_cam", "image_mean": [0.5] * 3}, "image_mean and image_std are needed both"),
    ],
)
def test_bad_arguments_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message) as error:
        explain(MODELS["resnet"](), pixels(), **options)
    assert "\n" not in str(error.value)


def test_bad_models_and_images_are_one_clear_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="model must be a CAStreamForImageClassification, got CAStreamModel"):
        explain(model.castream, pixels())
    for pixel_values in (torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match="pixel_values must have the shape"):
            explain(model, pixel_values)
    images = pixels()
    for pixel_values, got in (
        (None, "NoneType"),
        (images.numpy(), "ndarray"),
        (list(images), "list"),
        ({"pixel_values": images}, "dict"),
        (BatchFeature({"pixel_values": images}), "BatchFeature"),
        (images[:0], r"\(0, 3, "),
    ):
        with pytest.raises(
            ValueError, match=f"pixel_values must have the shape .* got {got}.*: pass image_pro"
        ) as error:
            explain(model, pixel_values)
        assert "\n" not in str(error.value)


def test_score_cam_of_several_labels_takes_each_labels_own_probability():
    """Under softmax, what is done to label 1 would move label 0's map."""
    config = CAStreamConfig(
        backbone_config=tiny_resnet(), num_labels=3, problem_type="multi_label_classification", init="reference"
    )
    torch.manual_seed(0)
    model, pixel_values = CAStreamForImageClassification(config).eval(), torch.randn(1, 3, 64, 64)
    before = explain(model, pixel_values, target=0, method="score_cam")
    with torch.no_grad():
        model.classifier.weight[1] *= 10
    torch.testing.assert_close(explain(model, pixel_values, target=0, method="score_cam"), before)
    assert before.max() > 0.9


def test_a_method_is_added_in_one_place(monkeypatch):
    """An entry of METHODS is all that `explain` and the pipeline need."""
    model, pixel_values = MODELS["resnet"](), pixels()
    raw = {"normalize": False, "upsample": False, "relu": False}
    entry = Method("Brightness", lambda features, *_: features.pixel_values.mean(1), pooled_layer_only=True)
    monkeypatch.setitem(methods_castream.METHODS, "brightness", entry)
    torch.testing.assert_close(explain(model, pixel_values, TARGET, "brightness", **raw), pixel_values.mean(1))
    with pytest.raises(ValueError, match="'brightness' explains the pooled feature map only"):
        explain(model, pixel_values, TARGET, "brightness", layer=0)
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    [answer] = model.explainer(processor)(np.zeros((64, 64), np.uint8), method="brightness", top_k=1)
    assert answer["method"] == "brightness" and not answer["saliency"].any()


def test_a_method_gets_the_gradients_that_it_asks_for(monkeypatch):
    model, pixel_values = MODELS["resnet"](), pixels()
    found = {}
    for needed in ("mean", "full"):
        entry = Method("Gradients", lambda feature_map, gradients: gradients.sum(1), gradients=needed)
        monkeypatch.setitem(methods_castream.METHODS, "gradients", entry)
        found[needed] = explain(model, pixel_values, TARGET, "gradients", relu=False, normalize=False, upsample=False)
    torch.testing.assert_close(found["mean"], found["full"].mean((1, 2), keepdim=True))
    assert found["full"].std() > 0


def test_a_class_agnostic_map_is_computed_once_for_all_targets(monkeypatch):
    calls, eigen_cam = [], methods_castream.METHODS["eigen_cam"]
    entry = replace(eigen_cam, equation=lambda *given: calls.append(given) or eigen_cam.equation(*given))
    monkeypatch.setitem(methods_castream.METHODS, "eigen_cam", entry)
    features = extract(MODELS["resnet"](), pixels())
    maps = explain_features(features, torch.arange(4).expand(3, 4), "eigen_cam")
    assert maps.shape[:2] == (3, 4) and len(calls) == 1
    for index in range(4):
        assert torch.equal(maps[:, index], explain_features(features, TARGET, "eigen_cam"))
