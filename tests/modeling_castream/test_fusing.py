"""Activations fused with convolutions: the same numbers as one after the other, in every dtype."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import nn

from modeling_castream.folding_castream import fold_batch_norms, folding, inference_backbone
from modeling_castream.fusing_castream import FusedConvolution, find_followers, fuse_activations
from tests.modeling_castream.test_folding import explained_model, trained

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def count_activations(network: nn.Module) -> int:
    return sum(isinstance(module, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)) for module in network.modules())


def fused_activations(network: nn.Module) -> int:
    fused = [module for module in network.modules() if isinstance(module, FusedConvolution)]
    return sum(not isinstance(module.activation, nn.Identity) for module in fused)


def check(network: nn.Module, expected: int) -> None:
    twin = fold_batch_norms(trained(network), PIXELS[:1])
    with torch.no_grad():
        before = twin(PIXELS)
        with torch.autocast("cpu", torch.bfloat16):
            before_bf16 = twin(PIXELS).float()
        fuse_activations(twin, PIXELS[:1])
        assert fused_activations(twin) == expected
        torch.testing.assert_close(twin(PIXELS), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            after_bf16 = twin(PIXELS)
        assert after_bf16.dtype == torch.bfloat16
        torch.testing.assert_close(after_bf16.float(), before_bf16, rtol=0.02, atol=0.02 * before.abs().max().item())


def test_every_activation_that_onednn_knows():
    check(torchvision.models.mobilenet_v2(), expected=35)  # ReLU6
    check(torchvision.models.mobilenet_v3_small(), expected=32)  # ReLU, Hardswish
    check(timm.create_model("tf_efficientnet_b0"), expected=49)  # SiLU, and convolutions padded as TensorFlow does
    check(torchvision.models.regnet_y_400mf(), expected=49)  # ReLU, grouped


def test_an_activation_elsewhere_than_after_a_convolution_stays():
    network = timm.create_model("resnet18")
    check(network, expected=9)  # eight more follow a sum


def test_values_of_one_convolution_match_those_of_the_two_modules():
    for activation in (nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), None):
        for options in ({}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "bias": False}):
            convolution = nn.Conv2d(4, 6, 3, **options)
            features = 5 * torch.randn(2, 4, 9, 9)
            with torch.no_grad():
                expected = (activation or nn.Identity())(convolution(features))
                fused = FusedConvolution(convolution, activation)
                torch.testing.assert_close(fused(features), expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(fused.double()(features.double()).float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "stride": 2}, {"kernel_size": 5}, {"kernel_size": (3, 1)}])
def test_padding_as_tensorflow_has_it(options):
    convolution = Conv2dSame(4, 6, padding=0, dilation=2 if options["kernel_size"] == 5 else 1, **options)
    for size in ((9, 12), (12, 9), (5, 5)):
        features = torch.randn(2, 4, *size)
        with torch.no_grad():
            expected = convolution(features)
            found = FusedConvolution(copy.deepcopy(convolution))(features)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_copy_of_a_model_is_fused_and_a_network_that_reads_its_convolutions_is_not():
    model, pixel_values = explained_model(), torch.randn(1, 3, 64, 64)
    with folding(), torch.no_grad():
        assert fused_activations(inference_backbone(model.castream.backbone, pixel_values)) > 0

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(pixel_values.to(self.convolution.weight.dtype)))

    network = trained(Reading())
    with folding(), torch.no_grad():
        twin = inference_backbone(network, pixel_values)
        assert twin is not network
        torch.testing.assert_close(twin(pixel_values), network(pixel_values), rtol=1e-5, atol=1e-5)


def test_followers_are_found_in_the_order_in_which_they_run():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(), nn.ReLU()).eval()
    pairs, output = find_followers(network, PIXELS, lambda module: isinstance(module, nn.ReLU))
    convolution, (parent, name, activation) = pairs[0]
    assert len(pairs) == 2 and torch.equal(output, network(PIXELS))  # dropout hands on what it gets
    assert (convolution, parent, name, activation) == (network[0], network, "1", network[1])
