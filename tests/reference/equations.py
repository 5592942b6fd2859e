"""The stream's equations (arXiv:2404.14996) once more, in plain Python loops over float64 numbers."""

import math


def attention_scores(query, feature_map, num_heads):
    """scores(p) = q . F(p) / sqrt(d), head by head. `query`: d numbers; `feature_map`: d rows of positions."""
    num_channels, num_positions = len(feature_map), len(feature_map[0])
    width = num_channels // num_heads
    scores = []
    for head in range(num_heads):
        row = []
        for position in range(num_positions):
            total = 0.0
            for channel in range(head * width, (head + 1) * width):
                total += query[channel] * feature_map[channel][position]
            row.append(total / math.sqrt(num_channels))
        scores.append(row)
    return scores


def softmax(scores):
    """a(p) = exp(score(p)) / sum_p' exp(score(p'))."""
    largest = max(scores)
    exponentials = [math.exp(score - largest) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def attend(attention, feature_map):
    """sum_p a(p) F(p), each head on its own channels."""
    num_channels, num_heads = len(feature_map), len(attention)
    width = num_channels // num_heads
    pooled = []
    for channel in range(num_channels):
        total = 0.0
        for position, value in enumerate(feature_map[channel]):
            total += attention[channel // width][position] * value
        pooled.append(total)
    return pooled


def linear(weight, bias, vector):
    """W v + b."""
    return [
        sum(weight[row][column] * vector[column] for column in range(len(vector))) + bias[row]
        for row in range(len(weight))
    ]


def stream(query, feature_maps, projections, num_heads):
    """q_{L+1} and the attention of every block. `projections`: (weight, bias) per block, or None for no linear map."""
    attentions = []
    for feature_map, projection in zip(feature_maps, projections, strict=True):
        attention = [softmax(row) for row in attention_scores(query, feature_map, num_heads)]
        query = attend(attention, feature_map)
        if projection is not None:
            query = linear(*projection, query)
        attentions.append(attention)
    return query, attentions
