"""Bootstrap intervals: known cases, coverage and determinism."""

import numpy as np
import pytest
from castream.evaluation import intervals
from castream.evaluation.intervals import Interval

from tests.evaluation.small import mean_interval


def test_constant_values_have_a_point_as_interval():
    assert mean_interval([3.0] * 10) == Interval(3.0, 3.0, 3.0)


def test_two_values_by_hand():
    """Of 0 and 1 the resampled means are 0, 1/2 and 1 with shares 1/4, 1/2, 1/4: 95 % spans all, 40 % the middle."""
    assert mean_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert mean_interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5, 0.5)


def test_close_to_the_normal_interval_of_many_values():
    values = np.random.default_rng(1).normal(10, 2, 2000)
    interval = mean_interval(values, n_boot=4000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_coverage_is_near_its_level():
    """Of 200 samples of 100 images, an interval of 90 % holds the true mean 180 times; 163 .. 195 is 4 deviations."""
    rng = np.random.default_rng(2)
    found = [mean_interval(rng.exponential(1.0, 100), level=0.9, n_boot=400, seed=i) for i in range(200)]
    assert 163 <= sum(interval.low <= 1 <= interval.high for interval in found) <= 195


def test_pairing_takes_out_what_is_common():
    rng = np.random.default_rng(3)
    common = rng.normal(50, 20, 300)
    a, b = common + 1 + rng.normal(0, 0.1, 300), common
    paired = mean_interval(a - b)
    assert 0.9 < paired.low < 1 < paired.high < 1.1
    assert paired.high - paired.low < 0.02 * (mean_interval(a).high - mean_interval(a).low)


def test_deterministic_by_seed():
    values = np.random.default_rng(4).random(50)
    assert mean_interval(values, seed=7) == mean_interval(values, seed=7)
    assert mean_interval(values, seed=7) != mean_interval(values, seed=8)
    assert mean_interval(values.astype(np.float32).tolist()).mean == pytest.approx(values.mean(), abs=1e-6)


def test_blocks_hold_all_resamples(monkeypatch):
    """Many small blocks, the last one not full, give as many resampled means as one block."""
    monkeypatch.setattr(intervals, "DRAWS_PER_BLOCK", 64)
    means = intervals._bootstrap_means(np.arange(20.0), n_boot=1000, seed=0)
    assert means.shape == (1000,)
    assert means.mean() == pytest.approx(9.5, abs=0.2) and np.unique(means).size > 50


def test_figures_of_the_same_images_share_draws_and_change_nothing():
    values = np.random.default_rng(5).random((37, 4))
    together = intervals.mean_intervals(values, seed=3)
    for column, interval in zip(values.T, together, strict=True):
        assert interval == pytest.approx(mean_interval(column, seed=3), abs=1e-12)


def test_bootstrap_means_are_those_of_the_images_drawn():
    """The draws again, image by image."""
    values, generator = np.random.default_rng(6).random(11), np.random.Generator(np.random.PCG64(9))
    drawn = generator.integers(11, size=(5, 11), dtype=np.uint32)
    expected = [sum(values[image] for image in draw) / 11 for draw in drawn]
    np.testing.assert_allclose(intervals._bootstrap_means(values, 5, seed=9), expected, rtol=1e-12)


def test_one_image_has_a_mean_but_no_interval():
    assert mean_interval([4.0]) == Interval(4.0, None, None)
    assert str(mean_interval([4.0])) == "4.00 [one image]"
    assert str(Interval(1.234, 1.0, 2.345)) == "1.23 [1.00, 2.35]"
