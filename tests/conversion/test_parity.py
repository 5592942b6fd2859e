"""The proof itself: it must fail, and say where, when a conversion is wrong."""

import pytest
import torch
from castream.conversion.classifier import convert, load_source, write_classifier
from castream.conversion.mapping import load_renamed, rename
from castream.conversion.parity import check_parity

from benchmarks.random_networks import write_random_source


@pytest.fixture
def resnet(tmp_path):
    """Source, conversion and names of a small ResNet's weights."""
    source = load_source(*write_random_source("transformers:resnet", tmp_path / "source"))
    return source, *convert(source)


def test_exact_conversion_passes(resnet):
    source, model, renamed = resnet
    parity = check_parity(source, model, source.image_processor, renamed)
    assert parity.logits <= 1e-5 and parity.pixels == 0.0 and parity.largest_logit > 0.1


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("castream.backbone.encoder.stages.1.layers.1.layer.0.normalization.running_mean", "encoder.stages.1.layers.1"),
        ("classifier.bias", "first after classifier"),
    ],
)
def test_a_wrong_weight_is_found(resnet, weight, where):
    source, model, renamed = resnet
    with torch.no_grad():
        model.state_dict()[weight] += 0.5
    with pytest.raises(ValueError, match="logits differ") as error:
        check_parity(source, model, source.image_processor, renamed)
    assert where in str(error.value)


def test_a_layer_left_out_is_found(resnet):
    source, model, renamed = resnet
    model.castream.backbone.encoder.stages[3].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match=r"first between .* and classifier.1"):
        check_parity(source, model, source.image_processor, renamed)


def test_other_pixels_are_found(resnet):
    source, model, renamed = resnet
    processor = type(source.image_processor)(**source.image_processor.to_dict() | {"image_mean": [0.5, 0.5, 0.4999]})
    with pytest.raises(ValueError, match="image processors differ"):
        check_parity(source, model, processor, renamed)


def test_a_wrong_conversion_writes_nothing(resnet, tmp_path):
    source, _, _ = resnet
    source.config["backbone_config"].hidden_act = "gelu"
    with pytest.raises(ValueError, match="logits differ"):
        write_classifier(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


RULES = [(r"^head\.", "classifier."), (r"^norm\.", ("a.", "b.")), (r"^", "backbone.")]


def test_rename():
    targets = {"classifier.weight", "a.weight", "b.weight", "backbone.conv"}
    assert rename(["head.weight", "norm.weight", "conv"], RULES, targets) == {
        "head.weight": ["classifier.weight"],
        "norm.weight": ["a.weight", "b.weight"],
        "conv": ["backbone.conv"],
    }


@pytest.mark.parametrize(
    ("names", "targets", "message"),
    [
        (["conv", "lost"], {"backbone.conv"}, "1 weights without a counterpart in the converted model: lost"),
        (["conv"], {"backbone.conv", "more"}, "1 weights of the converted model without a source: more"),
        (["head.x", "x"], {"backbone.x", "classifier.x"}, None),
        (["neck.x", "x"], {"backbone.x"}, "without a counterpart"),
    ],
)
def test_nothing_is_dropped_or_left(names, targets, message):
    if message is None:
        assert len(rename(names, RULES, targets)) == 2
        return
    with pytest.raises(ValueError, match=message):
        rename(names, RULES, targets)


def test_two_sources_of_one_weight():
    with pytest.raises(ValueError, match=r"two sources: backbone\.x"):
        rename(["x", "other.x"], [(r"^(other\.)?", "backbone.")], {"backbone.x"})


def test_shapes():
    """A 1x1 convolution's weight fits a linear layer; a transposed one does not."""
    model = torch.nn.Linear(3, 2, bias=False)
    weight = torch.arange(6.0).reshape(2, 3, 1, 1)
    load_renamed(model, {"conv": weight}, {"conv": ["weight"]})
    assert torch.equal(model.weight, weight[..., 0, 0])
    with pytest.raises(ValueError, match=r"conv has the shape \(3, 2\), \(2, 3\) was expected"):
        load_renamed(model, {"conv": torch.zeros(3, 2)}, {"conv": ["weight"]})
