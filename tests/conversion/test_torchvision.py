"""torchvision's classifiers: where each is cut, what a file says of it, and which do not average."""

import argparse

import pytest
import torch
from castream.conversion.classifier import load_source
from castream.conversion.torchvision_sources import network_config
from torchvision.models import get_model

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from modeling_castream.network_castream import describe_features

DEPTHS = {  # by name: what the stream reads, and how many channels the head does
    "convnext_tiny": ("features.1 features.3 features.5 features.7", 768),
    "densenet121": ("features.pool0 features.denseblock1 features.denseblock2 features.denseblock3 neck", 1024),
    "efficientnet_b0": ("features.1 features.2 features.3 features.5 features.8", 1280),
    "googlenet": ("maxpool1 conv3 inception3b inception4e inception5b", 1024),
    "inception_v3": ("maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 Mixed_5d Mixed_6e Mixed_7c", 2048),
    "maxvit_t": ("stem blocks.0 blocks.1 blocks.2 blocks.3", 512),
    "mnasnet0_5": ("layers.7 layers.8 layers.9 layers.11 layers.16", 1280),
    "mobilenet_v2": ("features.1 features.3 features.6 features.13 features.18", 1280),
    "mobilenet_v3_large": ("features.1 features.3 features.6 features.12 features.16", 960),
    "regnet_y_400mf": (
        "stem trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output.block4",
        440,
    ),
    "resnet18": ("maxpool layer1 layer2 layer3 layer4", 512),
    "shufflenet_v2_x0_5": ("maxpool stage2 stage3 conv5", 1024),
    "swin_t": ("features.1 features.3 features.5 neck", 768),
    "swin_v2_t": ("features.1 features.3 features.5 neck", 768),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths(name):
    """The last layer at each resolution; a stem ends with its max-pooling."""
    config = network_config(name)
    channels = describe_features(config, 5)
    layers, num_channels = DEPTHS[name]
    assert config.features == {"layout": "NCHW", "layers": layers.split()}
    assert channels[-1] == num_channels and len(channels) == len(layers.split())


@torch.no_grad()
def test_the_stream_reads_any_layer():
    """Maps of Swin's layers, which have channels last, arrive with channels first."""
    layers = ["features.0", "features.1.0", "neck"]
    config = CAStreamConfig(backbone_config=network_config("swin_t"), num_labels=2, stream_layers=layers)
    model = CAStreamForImageClassification(config).eval()
    assert config.stream_channels == [96, 96, 768]
    out = model(torch.randn(1, 3, 64, 96), output_hidden_states=True)
    assert [tuple(one.shape[2:]) for one in out.hidden_states] == [(16, 24), (16, 24), (2, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alexnet", "its classifier reads every position of the last feature map with weights of its own"),
        ("vgg11", "its classifier reads every position of the last feature map with weights of its own"),
        (
            "squeezenet1_1",
            "it averages scores of classes, which a convolution and an activation make at every position",
        ),
        ("vit_b_32", "its classifier reads the CLS token"),
    ],
)
def test_refusals_say_what_the_network_does(name, message):
    with pytest.raises(ValueError, match=f"torchvision:{name}: .* has no global average pooling.*: {message}"):
        load_source(f"torchvision:{name}")


@pytest.fixture
def load(tmp_path):
    """A function that writes weights, with what else a file holds, and loads them as the named network's."""

    def load(name: str, state: dict, **more):
        torch.save({"model": state, **more}, tmp_path / "weights.pth")
        return load_source(f"torchvision:{name}", str(tmp_path / "weights.pth"))

    return load


def test_file_forms(load):
    """DenseNet's published files have older names, Inception's heads for training only; MNASNet asks for a version."""
    state = get_model("densenet121", num_classes=3).state_dict()
    older = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for name, value in state.items()}
    assert torch.equal(load("densenet121", older).state["classifier.weight"], state["classifier.weight"])
    state = get_model("googlenet", num_classes=3, init_weights=False).state_dict()
    assert any(name.startswith("aux1") for name in state)
    assert load("googlenet", state).config["num_labels"] == 3
    assert load("mnasnet0_5", get_model("mnasnet0_5", num_classes=3).state_dict()).config["num_labels"] == 3


def test_an_inception_network_s_own_normalisation(load):
    """It undoes ImageNet's where training started from published weights, as far as the file tells."""
    state = get_model("googlenet", num_classes=3, init_weights=False).state_dict()
    pixel_values = torch.rand(1, 3, 64, 64)
    logits = {}
    for weights, transforms in ((None, False), ("IMAGENET1K_V1", True)):
        source = load("googlenet", state, args=argparse.Namespace(model="googlenet", weights=weights))
        logits[weights] = source.logits(pixel_values)
        network = get_model("googlenet", num_classes=3, init_weights=False, transform_input=transforms).eval()
        network.load_state_dict(state)
        assert torch.equal(logits[weights], network(pixel_values))
    assert not torch.equal(logits[None], logits["IMAGENET1K_V1"])
    assert torch.equal(load("googlenet", state).logits(pixel_values), logits["IMAGENET1K_V1"])


def test_heads(load):
    """A linear layer in the place of dropout and a linear layer is the same; other layers must be the network's own."""
    state = get_model("mobilenet_v2", num_classes=3).state_dict()
    weight = state["classifier.1.weight"]
    for name in ("classifier.", "classifier.1.1.", "classifier.2."):
        changed = {key.replace("classifier.1.", name): value for key, value in state.items()}
        assert torch.equal(load("mobilenet_v2", changed).state["classifier.1.weight"], weight), name
    body = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    with pytest.raises(ValueError, match=r"several layers \(classifier\.0\.weight, classifier\.3\.weight\)"):
        load("mobilenet_v2", body | {"classifier.0.weight": weight, "classifier.3.weight": weight})
    state = get_model("mobilenet_v3_small", num_classes=3).state_dict()
    assert load("mobilenet_v3_small", state).config["num_labels"] == 3
    plain = {key.replace(".3.", "."): value for key, value in state.items() if not key.startswith("classifier.0")}
    with pytest.raises(ValueError, match=r"has no classifier\.3\.weight"):
        load("mobilenet_v3_small", plain)
