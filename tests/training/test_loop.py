import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from castream.training.checkpoint import Progress
from castream.training.loop import Schedule, Steps, WeightAverage
from castream.training.run import make_optimizer


def rates(points, schedule="one_cycle", warmup=0.1):
    return [Schedule(schedule, 2.0, warmup)(point) for point in points]


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


class Loader:
    """Batches of four images, ten per epoch, the place being the number of the batch."""

    rows, bad = 0, ()

    def epoch(self, epoch, state=None):
        for number in range(state or 0, 10):
            self.rows += 4
            yield {"keys": [f"{epoch}:{number}"] * 4}, number + 1


class Interruption:
    requested = False


@pytest.fixture
def steps():
    def make(progress, place=None, accumulation=1, **limits):
        accelerator = SimpleNamespace(num_processes=1, gradient_accumulation_steps=accumulation)
        bad_images = SimpleNamespace(check=lambda *args, **options: None)
        limits = {"epochs": 2, "max_steps": None, "num_images": 80} | limits
        return Steps(accelerator, Loader(), progress, place, Interruption(), bad_images, **limits)

    return make


def test_whichever_ends_the_run_first_sets_its_fraction(steps):
    for max_steps, expected in ((None, 0.42), (20, 10.5 / 20), (1000, 0.42)):
        progress = Progress(step=10, images=418)
        step = next(iter(steps(progress, max_steps=max_steps, num_images=1000, epochs=5)))
        assert step.fraction == pytest.approx(expected)


def test_steps_over_two_epochs(steps):
    run = steps(Progress(), accumulation=3)
    found = [(step.number, len(step.batches), step.images, run.place) for step in run]
    once = [(1, 3, 12, 3), (2, 3, 12, 6), (3, 3, 12, 9), (4, 1, 4, 10)]
    assert found == once + [(number + 4, *rest) for number, *rest in once]
    assert run.progress == Progress(epoch=2, step=8, images=80, rows=80)


def test_steps_go_on_at_their_place_and_end_after_max_steps(steps):
    run = steps(Progress(epoch=1, step=15, images=60, rows=60), place=5, max_steps=17)
    assert [step.batches[0]["keys"][0] for step in run] == ["1:5", "1:6"]
    assert run.progress == Progress(epoch=1, step=17, images=68, rows=68) and list(run) == []


def test_a_step_that_was_read_as_the_run_was_told_to_stop_counts_for_nothing(steps):
    run = steps(Progress())
    for step in run:
        run.interruption.requested = step.number == 3
    assert run.stopped and run.place == 3 and run.progress == Progress(step=3, images=12, rows=12)


def test_constant_after_warmup():
    assert rates([0.05, 0.2, 1], schedule="constant") == pytest.approx([1, 2, 2])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_continuous_and_never_above_the_highest(schedule):
    found = rates([index / 1000 for index in range(1001)], schedule=schedule)
    assert max(found) <= 2.0 and min(found) >= 0
    assert max(abs(b - a) for a, b in itertools.pairwise(found)) < 2 * math.pi / 100


def test_the_average_of_weights_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    ema = WeightAverage({"weight": weight}, decay=0.5)
    expected = 1.0
    for step, value in enumerate((4.0, -2.0, 7.0), start=1):
        weight.data.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.averages["weight"].item() == pytest.approx(expected)
    ema.apply()
    assert weight.item() == pytest.approx(expected)


def test_the_query_learns_at_its_own_rate():
    model = torch.nn.Module()
    model.stream = torch.nn.Module()
    model.stream.query, model.stream.weight = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    for rate, expected in ((1.0, {1e-2}), (10.0, {1e-2, 1e-1})):
        optimizer = make_optimizer(model, "sgd", 1e-2, 0.0, rate)
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
        assert {1e-2 * group.get("lr_scale", 1) for group in optimizer.param_groups if group["params"]} == expected
    [group] = [group for group in optimizer.param_groups if "lr_scale" in group]
    assert group["params"][0] is model.stream.query and group["weight_decay"] == 0
