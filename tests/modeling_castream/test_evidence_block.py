"""The evidence block's equations, recomputed in plain loops in float64."""

import math

import pytest
import torch

from modeling_castream.evidence_castream import EvidenceBlock

CHANNELS, FINER_CHANNELS, LABELS = 5, 3, 4


def make_block(query: str, finer: bool = True) -> EvidenceBlock:
    """A block in float64 whose every parameter is off its starting value."""
    torch.manual_seed(0)
    block = EvidenceBlock(query, CHANNELS, FINER_CHANNELS if finer else None).double()
    block.reset_parameters()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return block


def make_inputs(finer: bool = True, batch_size: int = 2):
    """Feature maps (5 channels of 2 x 3, finer: 3 channels of 4 x 6), logits, memory."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pooled = draw(batch_size, CHANNELS, 2, 3)
    maps = (draw(batch_size, FINER_CHANNELS, 4, 6), pooled) if finer else (pooled,)
    rows = draw(LABELS, CHANNELS)
    return maps, draw(batch_size, LABELS), rows - rows.mean(0)


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


def unit(vector: list[float]) -> list[float]:
    return [value / length(vector) for value in vector]


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def query_by_loops(block: EvidenceBlock, pooled: list[float], logits: list[float], memory, target=None) -> list[float]:
    bias = block.bias.tolist()
    if not block.reads_memory:
        return bias
    temperature = math.exp(block.scalar("log_temperature").item())
    weights = [math.exp(value / temperature) for value in logits]
    weights = [weight / sum(weights) for weight in weights]
    if target is not None:
        weights = [float(index == target) for index in range(len(logits))]
    read = unit([sum(weights[c] * memory[c][k] for c in range(LABELS)) for k in range(CHANNELS)])
    direction = unit(pooled)
    low = [dot(row, direction) for row in block.down.weight.tolist()]
    correction = [dot(row, low) for row in block.up.weight.tolist()]
    weight = block.scalar("pooled").item()
    return [read[k] + weight * direction[k] + bias[k] + correction[k] for k in range(CHANNELS)]


def scores_by_loops(block: EvidenceBlock, feature_map, logits, memory, target=None) -> list[list[float]]:
    """s at the pooled map's resolution, of one image; feature_map is [channel][row][column]."""
    rows, columns = len(feature_map[0]), len(feature_map[0][0])
    places = [(i, j) for i in range(rows) for j in range(columns)]
    vectors = {(i, j): [feature_map[k][i][j] for k in range(CHANNELS)] for i, j in places}
    pooled = [sum(vectors[place][k] for place in places) / len(places) for k in range(CHANNELS)]
    query = unit(query_by_loops(block, pooled, logits, memory, target))
    mean_length = sum(length(vectors[place]) for place in places) / len(places)
    first = {}
    for place in places:
        norm = length(vectors[place]) / mean_length
        first[place] = block.scalar("sharpness").item() * dot(query, unit(vectors[place]))
        first[place] += block.scalar("norm").item() * norm + block.scalar("log_norm").item() * math.log(norm)
    scores = [[0.0] * columns for _ in range(rows)]
    for i, j in places:
        near = [first[a, b] for a, b in places if abs(a - i) <= 1 and abs(b - j) <= 1]
        scores[i][j] = first[i, j] + block.scalar("smoothing").item() * sum(near) / len(near)
    return scores


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("query", ["memory", "constant"])
def test_scores_at_the_pooled_resolution(query, target):
    block, (maps, logits, memory) = make_block(query, finer=False), make_inputs(finer=False)
    ids = None if target is None else torch.full((2,), target)
    scores = block.scores(maps, logits, memory, ids)
    for item in range(2):
        expected = scores_by_loops(block, maps[0][item].tolist(), logits[item].tolist(), memory.tolist(), target)
        torch.testing.assert_close(scores[item], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_finer_map_adds_its_own_similarity_to_the_upsampled_scores():
    block, (maps, logits, memory) = make_block("memory"), make_inputs()
    scores = block.scores(maps, logits, memory)
    query, gain = unit(block.finer_query.tolist()), block.scalar("finer_sharpness").item()
    coarse = scores_by_loops(block, maps[1][0].tolist(), logits[0].tolist(), memory.tolist())

    def upsampled(i: int, j: int) -> float:
        """Bilinear by two, corners not aligned: pixel centres at (i + 0.5) / 2 - 0.5, held at the border."""
        y, x = max((i + 0.5) / 2 - 0.5, 0.0), max((j + 0.5) / 2 - 0.5, 0.0)
        top, left = int(y), int(x)
        below, right = min(top + 1, 1), min(left + 1, 2)
        fy, fx = y - top, x - left
        upper = (1 - fx) * coarse[top][left] + fx * coarse[top][right]
        lower = (1 - fx) * coarse[below][left] + fx * coarse[below][right]
        return (1 - fy) * upper + fy * lower

    for i in range(4):
        for j in range(6):
            key = unit(maps[0][0, :, i, j].tolist())
            assert scores[0, i, j].item() == pytest.approx(upsampled(i, j) + gain * dot(query, key), abs=1e-12)


@pytest.mark.parametrize("query", ["memory", "constant"])
def test_a_map_is_a_distribution_and_items_do_not_meet(query):
    block, (maps, logits, memory) = make_block(query), make_inputs(batch_size=3)
    together = block(maps, logits, memory)
    assert together.shape == (3, 4, 6)
    torch.testing.assert_close(together.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    for item in range(3):
        alone = block(tuple(one[item : item + 1] for one in maps), logits[item : item + 1], memory)
        torch.testing.assert_close(alone[0], together[item], rtol=0, atol=1e-14)


def test_before_training_the_memory_reads_the_classifier_and_a_constant_query_next_to_nothing():
    maps, logits, memory = (make_inputs(finer=False)[0], *make_inputs()[1:])
    block = EvidenceBlock("memory", CHANNELS).double()
    block.reset_parameters()
    expected = (logits.softmax(-1) @ memory)[:, :, None, None]
    cosine = torch.nn.functional.cosine_similarity(maps[0], expected)
    torch.testing.assert_close(block.scores(maps, logits, memory), 5.0 * cosine)
    constant = EvidenceBlock("constant", CHANNELS).double()
    constant.reset_parameters()
    assert constant.bias.abs().max() < 0.1


def test_features_of_zeros_leave_the_map_finite():
    block, (maps, logits, memory) = make_block("memory"), make_inputs()
    evidence = block(tuple(torch.zeros_like(one) for one in maps), logits, memory)
    torch.testing.assert_close(evidence, torch.full_like(evidence, 1 / 24))
