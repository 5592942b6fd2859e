"""Every equation of the stream against plain loops in float64."""

import pytest
import torch

from modeling_castream.modeling_castream import CrossAttentionStream, attend, attention_scores
from tests.reference import equations

HEIGHT, WIDTH = 3, 2


def flat(feature_map):
    return feature_map.flatten(1).tolist()


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_scores(num_heads):
    query, feature_map = torch.randn(2, 1, 8).double(), torch.randn(2, 8, HEIGHT, WIDTH).double()
    actual = attention_scores(query, feature_map, num_heads)
    for item in range(2):
        expected = equations.attention_scores(query[item, 0].tolist(), flat(feature_map[item]), num_heads)
        torch.testing.assert_close(actual[item], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attend(num_heads):
    attention = torch.rand(2, num_heads, HEIGHT * WIDTH).double()
    feature_map = torch.randn(2, 8, HEIGHT, WIDTH).double()
    actual = attend(attention, feature_map, num_heads)
    for item in range(2):
        expected = equations.attend(attention[item].tolist(), flat(feature_map[item]))
        torch.testing.assert_close(actual[item, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("output_projection", [True, False])
@pytest.mark.parametrize(("num_queries", "num_heads"), [(1, 1), (1, 2), (3, 1)])
def test_stream(num_queries, num_heads, output_projection):
    channels = [4, 6, 8]
    module = CrossAttentionStream(channels, num_queries, num_heads, output_projection).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        feature_maps = [torch.randn(2, c, HEIGHT + c, WIDTH).double() for c in channels]
        query, attention_maps = module(feature_maps)
    projections = [
        None
        if isinstance(b.projection, torch.nn.Identity)
        else (b.projection.weight.tolist(), b.projection.bias.tolist())
        for b in module.blocks
    ]
    for item in range(2):
        for index in range(num_queries):
            expected, expected_attention = equations.stream(
                module.query[index].tolist(), [flat(f[item]) for f in feature_maps], projections, num_heads
            )
            torch.testing.assert_close(
                query[item, index], torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10
            )
            for attention_map, rows in zip(attention_maps, expected_attention, strict=True):
                actual = attention_map[item, index * num_heads : (index + 1) * num_heads].flatten(1)
                torch.testing.assert_close(actual, torch.tensor(rows, dtype=torch.float64), atol=1e-10, rtol=1e-10)


def test_scores_of_half_precision_features_are_float32():
    query, feature_map = torch.randn(1, 1, 8).bfloat16(), torch.randn(1, 8, HEIGHT, WIDTH).bfloat16()
    assert attention_scores(query, feature_map, 1).dtype == torch.float32


def test_heads_keep_the_scale_of_all_channels():
    query, feature_map = torch.ones(1, 1, 16), torch.ones(1, 16, 1, 1)
    assert attention_scores(query, feature_map, 4).flatten().tolist() == [1.0] * 4  # 4 products over sqrt(16)


def test_hand_computed_block():
    feature_map = torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])  # two channels, two positions
    query = torch.tensor([[[2**0.5, 0.0]]])
    scores = attention_scores(query, feature_map, 1)
    torch.testing.assert_close(scores, torch.tensor([[[0.0, 2.0]]]))
    weight = 1 / (1 + torch.tensor(-2.0).exp())  # sigmoid(2) of the second position
    torch.testing.assert_close(
        attend(scores.softmax(-1), feature_map, 1), torch.stack([2 * weight, torch.tensor(1.0)])[None, None]
    )
