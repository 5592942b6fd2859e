import itertools
import math

import pytest
import torch
from castream.training.arguments import TrainingArguments
from castream.training.progress import Progress
from castream.training.schedules import learning_rate, run_progress


def rates(points, **settings):
    args = TrainingArguments(**{"learning_rate": 2.0, "warmup": 0.1} | settings)
    return [learning_rate(args, point) for point in points]


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = 101
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=steps, pct_start=0.3)
    for step in range(steps):
        # torch's warm-up ends at pct_start * steps - 1; ours at the fraction itself
        end = 0.3 * steps - 1
        progress = 0.3 * step / end if step <= end else 0.3 + 0.7 * (step - end) / (steps - 1 - end)
        expected = theirs.get_last_lr()[0]
        assert rates([progress], schedule="one_cycle", warmup=0.3)[0] == pytest.approx(expected, rel=1e-9)
        if step < steps - 1:
            optimizer.step()
            theirs.step()


def test_cosine_by_hand():
    assert rates([0, 0.05, 0.1, 0.55, 1, 1.5], schedule="cosine") == pytest.approx([0, 1, 2, 1, 0, 0])


def test_step_divides_by_ten():
    found = rates([0.2, 0.49, 0.51, 0.99], schedule="step", epochs=20, step_epochs=10, warmup=0.0)
    assert found == pytest.approx([2, 2, 0.2, 0.2])


def test_whichever_ends_the_run_first_sets_its_progress():
    progress = Progress(step=10, images=400)
    found = [run_progress(TrainingArguments(max_steps=steps), progress, 40, 1000) for steps in (None, 20, 1000)]
    assert found == pytest.approx([0.42, 10.5 / 20, 0.42])


def test_constant_after_warmup():
    assert rates([0.05, 0.2, 1], schedule="constant") == pytest.approx([1, 2, 2])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_continuous_and_never_above_the_highest(schedule):
    found = rates([index / 1000 for index in range(1001)], schedule=schedule)
    assert max(found) <= 2.0 and min(found) >= 0
    assert max(abs(b - a) for a, b in itertools.pairwise(found)) < 2 * math.pi / 100
