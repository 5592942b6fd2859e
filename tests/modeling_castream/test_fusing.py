"""Sums and activations fused with convolutions: the same numbers as one after the other, in every dtype."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_castream.folding_castream import fold_batch_norms, folding, inference_backbone
from modeling_castream.fusing_castream import FusedConvolution, find_followers, fuse
from tests.modeling_castream.test_folding import explained_model, trained

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@contextmanager
def counted() -> Iterator[Counter]:
    """Operations that are called: convolutions by what they take along, and the sums and activations that are left."""
    found = Counter()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func.overloadpacket).rpartition(".")[2]
            if name == "_convolution_pointwise":
                binary = func._overloadname == "binary"
                found[("sum, " if binary else "") + str((args[10] if binary else args[7]) or "none")] += 1
            elif name.rstrip("_") in ("add", "relu", "clamp_min", "hardtanh", "silu", "hardswish"):
                found["left"] += 1
            return func(*args, **(kwargs or {}))

    with Note():
        yield found


def check(network: nn.Module, **expected: int) -> None:
    """The same values from the fused copy, in the first pass and in the later ones, which run these operations."""
    twin = fold_batch_norms(trained(network), PIXELS[:1])
    with torch.no_grad():
        before = twin(PIXELS)
        with torch.autocast("cpu", torch.bfloat16):
            before_bf16 = twin(PIXELS).float()
        assert fuse(twin)
        for _ in range(2):
            torch.testing.assert_close(twin(PIXELS), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16), counted() as found:
            after_bf16 = twin(PIXELS)
        assert after_bf16.dtype == torch.bfloat16
        torch.testing.assert_close(after_bf16.float(), before_bf16, rtol=0.02, atol=0.02 * before.abs().max().item())
    assert found == Counter({name.replace("sum_", "sum, "): number for name, number in expected.items()})


def test_every_activation_that_onednn_knows():
    check(torchvision.models.mobilenet_v2(), hardtanh=35, none=7, sum_none=10)  # ReLU6
    check(timm.create_model("tf_efficientnet_b0"), swish=49, none=23, sum_none=9)  # padded as TensorFlow does
    # ReLU and Hardswish, one of which follows a linear layer
    check(torchvision.models.mobilenet_v3_small(), relu=14, hardswish=18, none=14, sum_none=6, left=1)


def test_sums_and_the_activations_after_them():
    check(timm.create_model("resnet18"), relu=9, none=3, sum_relu=8)
    check(torchvision.models.resnet18(), relu=9, none=3, sum_relu=8)  # one activation module runs twice
    check(torchvision.models.regnet_y_400mf(), relu=49, none=20, sum_relu=16)  # grouped


def test_values_of_one_convolution_match_those_of_the_single_operations():
    addend = torch.randn(2, 6, 7, 7)
    for activation in (nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Identity()):
        for options in ({"padding": 0}, {"stride": 2, "padding": 3}, {"groups": 2, "dilation": 2, "padding": 1}):
            convolution = nn.Conv2d(4, 6, 3, bias=options["padding"] != 1, **options)
            features = 5 * torch.randn(2, 4, *[{0: 9, 1: 9, 3: 10}[options["padding"]]] * 2)
            with torch.no_grad():
                for dtype in (torch.float32, torch.float64):  # the second one is computed by torch
                    convolution, features = convolution.to(dtype), features.to(dtype)
                    fused = FusedConvolution(copy.deepcopy(convolution))
                    found = activation(fused(features)), activation(fused(features) + addend.to(dtype))
                    expected = activation(convolution(features)), activation(convolution(features) + addend.to(dtype))
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "stride": 2}, {"kernel_size": 5}, {"kernel_size": (3, 1)}])
def test_padding_as_tensorflow_has_it(options):
    convolution = Conv2dSame(4, 6, padding=0, dilation=2 if options["kernel_size"] == 5 else 1, **options)
    fused = FusedConvolution(copy.deepcopy(convolution))
    for size in ((9, 12), (12, 9), (5, 5)):
        features = torch.randn(2, 4, *size)
        with torch.no_grad():
            expected = convolution(features)
            placeholder = fused(features)
            assert placeholder.shape == expected.shape
            torch.testing.assert_close(placeholder.relu() + expected, expected.relu() + expected, rtol=1e-5, atol=1e-5)


def test_the_copy_of_a_model_is_fused_and_a_network_that_reads_its_convolutions_is_not():
    model, pixel_values = explained_model(), torch.randn(1, 3, 64, 64)
    with folding(), torch.no_grad():
        twin = inference_backbone(model.castream.backbone, pixel_values)
        with counted() as found:
            twin(pixel_values)
        assert found["relu"] and found["sum, relu"] and not found["left"]

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


class Unusual(nn.Module):
    """What networks might do with a convolution's output besides adding to it or activating it."""

    def __init__(self, use):
        super().__init__()
        self.first, self.norm, self.second, self.use = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            use,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        one = self.norm(self.first(pixel_values))
        return self.use(one, self.second(one))


@pytest.mark.parametrize(
    "use",
    [
        lambda one, two: F.relu(two) + two,  # used twice
        lambda one, two: F.relu(two, inplace=True) + two,  # and changed in between
        lambda one, two: (two.add_(one) * 2 + two, two),
        lambda one, two: one.add_(two) + one.relu_(),
        lambda one, two: torch.cat([two[:, :2], one[..., 1:2].expand_as(one)[:, :1] / 2], 1),
        lambda one, two: two + one.mean((2, 3), keepdim=True),  # another shape
        lambda one, two: two + 1 - one.double(),
        lambda one, two: torch.add(two, one, alpha=2).relu(),
        lambda one, two: F.silu(two + one) + F.hardtanh(one + two, -0.1, 0.1),
        lambda one, two: two.flatten(2).transpose(1, 2) @ one.flatten(2),
        lambda one, two: (one, {"two": two}, [two.shape[1] * two]),
    ],
)
def test_whatever_a_network_does_with_a_convolution(use):
    network = trained(Unusual(use))
    with torch.no_grad():
        expected = network(PIXELS)
        with folding():
            for _ in range(3):
                twin = inference_backbone(network, PIXELS)
                torch.testing.assert_close(twin(PIXELS), expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, FusedConvolution) for module in twin.modules())


def test_what_is_changed_before_a_waiting_convolution_reads_it_is_not_fused():
    def use(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return one.mul_(2) + two  # `two` reads `one` as it was

    network = trained(Unusual(use))
    with torch.no_grad(), folding():
        for _ in range(2):
            twin = inference_backbone(network, PIXELS)
            torch.testing.assert_close(twin(PIXELS), network(PIXELS), rtol=1e-4, atol=1e-5)
    assert twin is not network and not any(isinstance(module, FusedConvolution) for module in twin.modules())


def test_a_convolution_in_two_places_is_one():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.ReLU()))
    network[1].append(network[0])
    with torch.no_grad():
        features = torch.randn(1, 4, 6, 6)
        expected = network(features)
        assert fuse(network) and network[0] is network[1][1]
        for _ in range(2):
            torch.testing.assert_close(network(features) * 1, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_kept_once_and_can_be_used_in_any_dtype():
    convolution, features = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    fused = FusedConvolution(copy.deepcopy(convolution))
    with torch.no_grad():
        expected = convolution(features)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                found = fused(features) * 1
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
            assert (fused.convolution.weight is None) == (dtype != torch.float16)
        assert torch.equal(fused.convolution.weight, convolution.weight)
