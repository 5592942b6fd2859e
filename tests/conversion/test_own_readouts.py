"""Classifiers that average nothing, but read a CLS token or an attention pooling: exact, explained, trained."""

import pytest
import timm
import torch
from castream.conversion.classifier import write_classifier
from castream.conversion.timm_sources import describe
from transformers import AutoModelForImageClassification, ViTConfig

from benchmarks.random_networks import randomise
from modeling_castream import CAStreamConfig, CAStreamForImageClassification, explain
from tests.modeling_castream.tiny import METHODS, tiny_resnet

POSITIONAL = {"attention_cam", "ablation_cam"}  # methods that need a pooling over positions
SMALL = {"depth": 2, "embed_dim": 32, "img_size": 64, "num_heads": 2}
NETWORKS = {
    "test_vit": {},
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_small_patch16_rope_224": SMALL,
    "cait_xxs24_224": SMALL,
    "convit_tiny": {**SMALL, "depth": 3, "local_up_to_layer": 1, "embed_dim": 16},
    "xcit_nano_12_p8_224": SMALL,
}


@pytest.fixture(scope="module", params=NETWORKS)
def converted(request, tmp_path_factory):
    """A timm classifier in memory, and its conversion as it is loaded from its folder."""
    torch.manual_seed(0)
    options = NETWORKS[request.param]
    network = timm.create_model(request.param, num_classes=7, **options)
    size = options.get("img_size", 160)
    network.pretrained_cfg["input_size"] = (3, size, size)
    folder = tmp_path_factory.mktemp("timm") / "converted"
    write_classifier(describe(randomise(network, size), options, f"timm:{request.param}"), folder)
    return network.eval(), CAStreamForImageClassification.from_pretrained(folder)


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model):
    for parameter in model.castream.stream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def of_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The map of (batch_size, num_patches, num_channels) tokens of a square."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


@torch.no_grad()
def test_source_is_the_classifier_and_the_untrained_stream_adds_nothing(converted):
    network, model = converted
    pixel_values = pixels(network.pretrained_cfg["input_size"][-1])
    expected = network(pixel_values)
    for pooling in ("source", "ca"):
        assert (model(pixel_values, pooling=pooling).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=r"pooling='gap' does not exist here: .* pooling='source' is its own"):
        model(pixel_values, pooling="gap")


@pytest.mark.parametrize("pooling", ["source", "ca"])
def test_maps_are_not_flat(converted, pooling):
    network, model = converted
    trained(model)
    pixel_values = pixels(network.pretrained_cfg["input_size"][-1])
    for method in METHODS:
        if method == "score_cam" or (pooling == "source" and method in POSITIONAL):
            continue
        maps = explain(model, pixel_values, 3, method, pooling, normalize=False, relu=False, upsample=False)
        assert maps.isfinite().all() and (maps.std((1, 2)) > 1e-4 * maps.abs().mean((1, 2))).all(), method
    for method in POSITIONAL:
        with pytest.raises(ValueError, match=f"method '{method}' needs a pooling over positions"):
            explain(model, pixel_values, 3, method, "source")


def vit(name: str = "test_vit"):
    network = randomise(timm.create_model(name, num_classes=7), 160)
    return network.eval(), describe(network, {}, f"timm:{name}")


def build(source):
    model = CAStreamForImageClassification(CAStreamConfig(**source.config)).eval()
    state = {key: value for key, value in source.state.items() if not key.startswith("attn_pool.")}
    pool = {key[10:]: value for key, value in source.state.items() if key.startswith("attn_pool.")}
    model.classifier.load_state_dict({name: state.pop(f"head.{name}") for name in ("weight", "bias")})
    model.castream.backbone.timm_model.load_state_dict(state)
    if pool:
        model.castream.backbone.attention_pool.load_state_dict(pool)
    return model


def test_gradients_are_taken_where_the_last_block_reads_its_normalised_tokens():
    """As with target_layers=[model.blocks[-1].norm1] in pytorch-grad-cam's example for ViT."""
    network, source = vit()
    found = []
    network.blocks[-1].norm1.register_forward_hook(lambda module, args, output: found.append(output))
    logits = network(pixels(160))
    (gradients,) = torch.autograd.grad(logits[:, 3].sum(), found[0])
    feature_map, gradients = (of_tokens(one[:, 1:]) for one in (found[0].detach(), gradients))
    expected = {
        "grad_cam": (gradients.mean((2, 3), keepdim=True) * feature_map).sum(1),
        "hires_cam": (gradients * feature_map).sum(1),
    }
    model = build(source)
    for method, maps in expected.items():
        ours = explain(model, pixels(160), 3, method, "source", normalize=False, relu=False, upsample=False)
        torch.testing.assert_close(ours, maps, rtol=1e-4, atol=1e-5 * maps.abs().max().item())


def test_cls_attention_is_the_last_block_s_softmax():
    network, source = vit()
    attention = network.blocks[-1].attn
    attention.fused_attn = False
    found = []
    attention.attn_drop.register_forward_hook(lambda module, args, output: found.append(args[0]))
    network(pixels(160))
    expected = of_tokens(found[0][:, :, 0, 1:].mean(1)[..., None])[:, 0]
    model = build(source)
    for pooling in ("source", "ca"):
        ours = explain(model, pixels(160), None, "cls_attention", pooling, normalize=False, upsample=False)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_cls_attention_of_transformers_is_the_attention_it_returns():
    config = ViTConfig(image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    config.num_labels = 7
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=config, whole_classifier=True, num_labels=7))
    for parameter in model.castream.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    eager = AutoModelForImageClassification.from_config(config, attn_implementation="eager").eval()
    state = model.castream.backbone.network.state_dict()
    eager.load_state_dict(state | {f"classifier.{key}": value for key, value in model.classifier.state_dict().items()})
    with torch.no_grad():
        attentions = eager(pixels(64), output_attentions=True).attentions[-1]
    expected = of_tokens(attentions[:, :, 0, 1:].mean(1)[..., None])[:, 0]
    ours = explain(model, pixels(64), None, "cls_attention", normalize=False, upsample=False)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_raw_attention_under_source_is_the_attention_pooling_s():
    network, source = vit("test_vit3")
    pool = network.attn_pool
    tokens = network.forward_features(pixels(160))  # the pooling reads the prefix token, too
    keys = pool.kv(tokens).unflatten(2, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
    query = pool.q(pool.latent.expand(2, -1, -1)).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    scores = (pool.q_norm(query) * pool.scale) @ pool.k_norm(keys).transpose(2, 3)
    expected = of_tokens(scores.softmax(-1).mean(1).transpose(1, 2)[:, 1:])[:, 0]
    model = build(source)
    ours = explain(model, pixels(160), None, "raw_attention", "source", normalize=False, upsample=False)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="'cls_attention' needs a classifier that reads a CLS token"):
        explain(model, pixels(160), None, "cls_attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve_norm": True}, "preserve_norm=True needs a source that averages"),
        ({"output_projection": False}, "output_projection=False needs a source that averages"),
        ({"pooling": "gap"}, "pooling='gap' does not exist here"),
    ],
)
def test_what_needs_an_average_is_refused(options, message):
    config = ViTConfig(image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=message):
        CAStreamForImageClassification(CAStreamConfig(backbone_config=config, whole_classifier=True, **options))


def test_where_the_source_averages_both_names_are_its_average():
    torch.manual_seed(0)
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=tiny_resnet(), num_labels=3)).eval()
    gap, source = (model(pixels(64), pooling=name).logits for name in ("gap", "source"))
    assert torch.equal(gap, source)
    both = [explain(model, pixels(160), 1, "grad_cam", name, relu=False) for name in ("gap", "source")]
    assert torch.equal(*both) and (both[0].std((1, 2)) > 0).all()
