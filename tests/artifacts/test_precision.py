"""The trial that says whether a processor prefers bfloat16."""

import pytest
import torch
from castream.artifacts import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known():
    precision.bfloat16_share.cache_clear()
    yield
    precision.bfloat16_share.cache_clear()


@pytest.mark.parametrize(("half", "prefers"), [(0.5, True), (0.9, True), (0.95, False), (1.5, False)])
def test_bfloat16_is_preferred_where_it_saves_a_tenth_and_tried_once(monkeypatch, half, prefers):
    tried = []

    def seconds(images, weight):
        tried.append(images.dtype)
        return (half if weight.dtype == torch.bfloat16 else 1.0) * (10 if len(tried) <= 2 else 1)  # slow at first

    monkeypatch.setattr(precision, "_convolution_seconds", seconds)
    assert [precision.prefers_bfloat16(CPU) for _ in range(2)] == [prefers] * 2
    assert precision.bfloat16_share(CPU) == half
    assert tried == [torch.float32, torch.bfloat16] * 6


def test_a_convolution_is_timed():
    assert precision.bfloat16_share(CPU) > 0
