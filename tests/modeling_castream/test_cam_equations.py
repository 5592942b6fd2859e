"""The CAM methods on numbers small enough to work out by hand, and their weights against autograd's derivatives."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_castream import explain
from modeling_castream.cam_castream import (
    attention_terms,
    cosine_cam,
    eigen_cam,
    grad_cam,
    grad_cam_plus_plus,
    grad_cam_plus_plus_weights,
    hires_cam,
    layer_cam,
    normalize_maps,
    xgrad_cam,
)
from modeling_castream.modeling_castream import CrossAttentionStream
from tests.modeling_castream.tiny import METHODS

# Two channels on a 1 x 3 map, and the gradient of some logit there.
FEATURE_MAP = torch.tensor([[[[3.0, 0.0, 4.0]], [[4.0, 2.0, -3.0]]]])
GRADIENTS = torch.tensor([[[[1.0, 2.0, 3.0]], [[-1.0, 1.0, -3.0]]]])


def as_row(saliency):
    assert saliency.shape == (1, 1, 3)
    return saliency[0, 0].tolist()


def test_grad_cam_by_hand():
    assert as_row(grad_cam(FEATURE_MAP, GRADIENTS)) == [2 * 3 - 4, -2, 2 * 4 + 3]  # weights: means 2 and -1


def test_cosine_cam_by_hand():
    assert as_row(cosine_cam(FEATURE_MAP, GRADIENTS)) == pytest.approx([2 / 5, -1, 11 / 5])


def test_cosine_cam_is_zero_where_the_feature_is():
    assert as_row(cosine_cam(torch.zeros(1, 2, 1, 3), GRADIENTS)) == [0, 0, 0]


def test_hires_cam_by_hand():
    assert as_row(hires_cam(FEATURE_MAP, GRADIENTS)) == [3 - 4, 2, 12 + 9]


def test_layer_cam_by_hand():
    assert as_row(layer_cam(FEATURE_MAP, GRADIENTS)) == [3, 2, 12]


def test_xgrad_cam_by_hand():
    # channel 0: (3 + 0 + 12) / 7, channel 1: (-4 + 2 + 9) / 3
    first, second = 15 / 7, 7 / 3
    assert as_row(xgrad_cam(FEATURE_MAP, GRADIENTS)) == pytest.approx(
        [3 * first + 4 * second, 2 * second, 4 * first - 3 * second]
    )


def test_xgrad_cam_leaves_out_channels_that_sum_to_zero():
    feature_map = torch.tensor([[[[1.0, -1.0, 0.0]], [[1.0, 1.0, 1.0]]]])
    assert as_row(xgrad_cam(feature_map, GRADIENTS)) == [-1, -1, -1]


def test_grad_cam_plus_plus_by_hand():
    # sums of A: 7 and 3. alpha = 1 / (2 + sum g); channel 0: 1/9, 1/16, 1/23 at g = 1, 2, 3; channel 1: 1/5 at g = 1
    first, second = 1 / 9 + 2 / 16 + 3 / 23, 1 / 5
    expected = [3 * first + 4 * second, 2 * second, 4 * first - 3 * second]
    assert as_row(grad_cam_plus_plus(FEATURE_MAP, GRADIENTS)) == pytest.approx(expected)


def test_grad_cam_plus_plus_weights_are_zero_without_gradient():
    assert grad_cam_plus_plus_weights(FEATURE_MAP, torch.zeros_like(FEATURE_MAP)).tolist() == [[0, 0]]


def test_eq_19_against_second_and_third_derivatives_of_the_exponential_score():
    torch.manual_seed(0)
    feature_map = torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)
    inner, outer = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    score = outer @ (inner @ feature_map.flatten()).relu()  # piecewise linear, as Eq. 19 assumes
    (gradients,) = torch.autograd.grad(score, feature_map, retain_graph=True)
    output = score.exp()
    (first,) = torch.autograd.grad(output, feature_map, create_graph=True)
    expected = [0.0, 0.0]
    for channel in range(2):
        for row in range(2):
            for column in range(2):
                at = (channel, row, column)
                second = torch.autograd.grad(first[at], feature_map, create_graph=True)[0][at]
                third = torch.autograd.grad(second, feature_map, retain_graph=True)[0][at]
                alpha = second / (2 * second + feature_map[channel].sum() * third)
                expected[channel] += (alpha * first[at].relu() / output).item()
    weights = grad_cam_plus_plus_weights(feature_map.detach()[None], gradients[None])
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert max(expected) > 0


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 12, 2, 3)])  # fewer channels than positions, and more
def test_eigen_cam_against_svd(shape):
    torch.manual_seed(0)
    feature_map = torch.randn(shape)
    maps = eigen_cam(feature_map)
    for item in range(2):
        rows = feature_map[item].flatten(1).T
        expected = rows @ torch.linalg.svd(rows).Vh[0]
        expected = expected * expected.sum().sign()
        torch.testing.assert_close(maps[item].flatten(), expected, atol=1e-5, rtol=0)


def test_attention_terms_by_hand():
    direction = torch.tensor([[2.0, -1.0]])
    attention = torch.tensor([[[[0.5, 0.25, 0.25]], [[0.0, 1.0, 0.0]]]])  # a head per channel
    assert as_row(attention_terms(direction, FEATURE_MAP, attention)) == [0.5 * 6, -2, 0.25 * 8]
    assert as_row(attention_terms(direction, FEATURE_MAP, None)) == pytest.approx([2 / 3, -2 / 3, 11 / 3])


def test_normalize_maps():
    maps = torch.tensor([[[1.0, 3.0, 2.0]], [[5.0, 5.0, 5.0]], [[0.0, 0.0, 0.0]], [[1.0, 1.0 + 1e-7, 1.0]]])
    assert normalize_maps(maps)[:, 0].tolist() == [[0, 1, 0.5], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


class ToyClassifier(nn.Module):
    """A model whose feature map is its image: a stream of one block, q = (1, 0), and two classes."""

    has_linear_readout = True

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            stream_layers=["image"],
            pooling="ca",
            query="class_agnostic",
            label2id={"sky": 0, "sea": 1},
            num_labels=2,
            unit_keys=False,
            preserve_norm=False,
            evidence_queries=None,
            source_pooling="gap",
            source_readout="average",
        )
        self.castream = nn.Module()
        self.castream.stream = CrossAttentionStream([2], num_queries=1, num_heads=1, output_projection=False)
        self.castream.extract_features = lambda pixel_values: ((pixel_values,), None)
        self.castream.pool_features = self.pool_features
        self.head = nn.Sequential()
        self.classifier = nn.Linear(2, 2)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        with torch.no_grad():
            self.castream.stream.query.copy_(torch.tensor([[1.0, 0.0]]))
            self.classifier.weight.copy_(torch.tensor([[2.0, -1.0], [0.0, 1.0]]))
            self.classifier.bias.copy_(torch.tensor([0.25, -0.5]))

    def pool_features(self, feature_maps, pooling):
        if pooling == "gap":
            return feature_maps[-1].mean((2, 3)), ()
        query, attention_maps = self.castream.stream(feature_maps)
        return query.squeeze(1), attention_maps

    def probabilities(self, logits):
        return logits.softmax(-1)

    def classify(self, pooler_output, cls_token=None):
        return self.classifier(pooler_output)


# softmax of (log 2, 0, log 5) is (2, 1, 5) / 8: with d = 2 and q = (1, 0) the score is channel 0 over sqrt(2)
TOY_IMAGE = torch.tensor([[[[math.sqrt(2) * math.log(2), 0.0, math.sqrt(2) * math.log(5)]], [[4.0, 1.0, 0.5]]]])
FIRST, SECOND = TOY_IMAGE[0, 0, 0].tolist(), TOY_IMAGE[0, 1, 0].tolist()
CONTRAST = [2 * first - second for first, second in zip(FIRST, SECOND, strict=True)]  # class 0's direction: (2, -1)


def toy_map(method, pooling, target=0):
    with torch.no_grad():
        raw = explain(ToyClassifier(), TOY_IMAGE, target, method, pooling, relu=False, normalize=False, upsample=False)
    return as_row(raw)


@pytest.mark.parametrize("pooling", ["ca", "gap"])
def test_toy_grad_cam(pooling):
    assert toy_map("grad_cam", pooling) == pytest.approx([value / 3 for value in CONTRAST], abs=1e-6)
    assert toy_map("grad_cam", pooling, "sea") == pytest.approx([value / 3 for value in SECOND], abs=1e-6)


@pytest.mark.parametrize("pooling", ["ca", "gap"])
def test_toy_cosine_cam(pooling):
    lengths = [math.hypot(first, second) for first, second in zip(FIRST, SECOND, strict=True)]
    expected = [value / 3 / length for value, length in zip(CONTRAST, lengths, strict=True)]
    assert toy_map("cosine_cam", pooling) == pytest.approx(expected, abs=1e-6)


def test_toy_raw_attention():
    assert toy_map("raw_attention", "ca") == pytest.approx([2 / 8, 1 / 8, 5 / 8])


def test_toy_attention_cam_adds_up_to_the_logit():
    expected = [share / 8 * value for share, value in zip((2, 1, 5), CONTRAST, strict=True)]
    assert toy_map("attention_cam", "ca") == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        logit = ToyClassifier().classify(ToyClassifier().pool_features((TOY_IMAGE,), "ca")[0])[0, 0]
    assert sum(expected) + 0.25 == pytest.approx(float(logit), abs=1e-6)


def toy_gradients():
    """d logit_0 / d A_k(p) under "ca": a(p) (v_k + q_k / sqrt(2) (v . A(p) - v . pooled)), v = (2, -1), q = (1, 0)."""
    attention = [2 / 8, 1 / 8, 5 / 8]
    mean = sum(share * value for share, value in zip(attention, CONTRAST, strict=True))
    channel_0 = [share * (2 + (value - mean) / math.sqrt(2)) for share, value in zip(attention, CONTRAST, strict=True)]
    return channel_0, [-share for share in attention]


def test_toy_hires_and_layer_cam_see_the_attention():
    channel_0, channel_1 = toy_gradients()
    hires = [g * a + h * b for g, a, h, b in zip(channel_0, FIRST, channel_1, SECOND, strict=True)]
    assert toy_map("hires_cam", "ca") == pytest.approx(hires, abs=1e-6)
    layer = [max(g, 0) * a for g, a in zip(channel_0, FIRST, strict=True)]
    assert toy_map("layer_cam", "ca") == pytest.approx(layer, abs=1e-6)


def test_toy_grad_cam_plus_plus():
    channel_0, _ = toy_gradients()  # channel 1 has no positive gradient, hence weight 0
    total = sum(FIRST)
    weight = sum(max(g, 0) / (2 + total * g) for g in channel_0)
    assert toy_map("grad_cam_plus_plus", "ca") == pytest.approx([weight * a for a in FIRST], abs=1e-6)


def test_toy_ablation_cam_under_gap():
    # the logit is w . mean(A) + b: without channel k it loses w_k mean(A_k)
    losses = [2 * sum(FIRST) / 3, -sum(SECOND) / 3]
    logit = sum(losses) + 0.25
    weights = [loss / abs(logit) for loss in losses]
    expected = [weights[0] * first + weights[1] * second for first, second in zip(FIRST, SECOND, strict=True)]
    assert toy_map("ablation_cam", "gap") == pytest.approx(expected, abs=1e-5)


def test_toy_score_cam_under_gap():
    # at the image's own resolution the mask of channel k is the channel itself, min-max scaled
    weights = []
    for channel in (FIRST, SECOND):
        low, high = min(channel), max(channel)
        mask = [(value - low) / (high - low) for value in channel]
        pooled = [sum(m * a for m, a in zip(mask, one, strict=True)) / 3 for one in (FIRST, SECOND)]
        logits = [2 * pooled[0] - pooled[1] + 0.25, pooled[1] - 0.5]
        weights.append(math.exp(logits[0]) / (math.exp(logits[0]) + math.exp(logits[1])))
    expected = [weights[0] * first + weights[1] * second for first, second in zip(FIRST, SECOND, strict=True)]
    assert toy_map("score_cam", "gap") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_toy_maps_are_scaled_and_upsampled(method):
    saliency = explain(ToyClassifier(), TOY_IMAGE, 0, method)
    assert saliency.shape == (1, 1, 3) and saliency.min() == 0 and saliency.max() == 1
