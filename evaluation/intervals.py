"""Percentile bootstrap intervals of a mean over images.

One image is one unit: images are drawn with replacement, their mean is taken, and the interval holds the middle `level`
of these means. Two poolings or methods are compared by their difference on each image, because what makes an image hard
is common to both and cancels there.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from typing import NamedTuple

import numpy as np

# Draws made at once: bounds memory (a few tens of MB) however many images there are.
DRAWS_PER_BLOCK = 2**21


class Interval(NamedTuple):
    """A mean over images and its interval, in the values' unit; low and high are None for a single image."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.2f} [one image]"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_intervals(values: np.ndarray, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> list[Interval]:
    """Means of many figures of the same images with their intervals; the same arguments give the same digits.

    Images are drawn once for all figures: of 50,000 images, 300 figures take 9 s instead of 170 s.

    Args:
        values: (num_images, num_figures), finite.
    """
    means = values.mean(axis=0).tolist()
    if len(values) == 1:
        return [Interval(mean, None, None) for mean in means]
    bounds = np.quantile(_bootstrap_means(values, n_boot, seed), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(mean, low, high) for mean, low, high in zip(means, *bounds.tolist(), strict=True)]


def _bootstrap_means(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means of `n_boot` draws of len(values) images with replacement, (n_boot, ...)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    number, center = len(values), values.mean(axis=0)
    deviations = values - center  # equal values have no spread at all
    rows = max(1, DRAWS_PER_BLOCK // number)
    means = []
    for first in range(0, n_boot, rows):
        block = min(rows, n_boot - first)
        drawn = rng.integers(number, size=(block, number), dtype=np.uint32)
        place = drawn + number * np.arange(block)[:, None]  # how often each image was drawn, a row a draw
        counts = np.bincount(place.ravel(), minlength=block * number).reshape(block, number)
        means.append(center + counts @ deviations / number)
    return np.concatenate(means)
