import math

import pytest
import torch
from castream.training.evaluation import mean_average_precision


def test_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.3, 0.2], [0.1, 0.6]])
    labels = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]])
    # class 0: hits at ranks 1 and 3; class 1, ordered 1, 3, 2, 0: hits at ranks 2 and 3
    expected = ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert mean_average_precision(scores, labels) == pytest.approx(100 * expected)


def test_classes_without_images_do_not_count():
    scores, labels = torch.rand(5, 3), torch.zeros(5, 3)
    assert math.isnan(mean_average_precision(scores, labels))
    labels[2, 1] = 1
    scores[2, 1] = 2
    assert mean_average_precision(scores, labels) == 100
