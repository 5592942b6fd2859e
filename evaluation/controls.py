"""Controls: what a table of saliency metrics must hold still before a difference means that a map is better.

Average drop, gain and increase move with the confidence of the network and with the area that a map keeps, whatever the
map shows. Each control takes one of these away:

    random_map, center_gaussian, uniform_map   maps that know nothing of the network
    temperature   GAP's logits divided by the temperature at which its mean confidence (`confidences`) is CA's
    norm          CA's pooled vector scaled to the norm of GAP's, image by image
    bound         in CA's place an attention that is the mask itself, at GAP's norm: what pooling could gain at most by
                  leaving out what is masked
    map_only      CA's maps, all probabilities from the GAP network
    pooling_only  GAP's maps, all probabilities from CA at GAP's norm
    area          each map to the power at which its mean, upsampled, is that of the reference map of the same image
    randomization the map after shuffling the classifier's weights, correlated with the map before
"""

import copy
import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from .masking import upsample_saliency

MAX_EXPONENT = 64.0
BISECTIONS = 40
MAX_TEMPERATURE = 100.0
GAUSSIAN_SIGMA = 0.25


def control_maps(name: str, indices: list[int], size: tuple[int, int], seed: int) -> torch.Tensor:
    """Maps (batch_size, height, width), float32 in [0, 1], of a control, at the resolution of the feature map.

    Args:
        name: "random_map" (uniform noise, the image's own), "center_gaussian" (sigma 1/4 of each side) or
            "uniform_map" (ones).
        indices: of the images within the dataset; with `seed` they determine the noise.
        size: (height, width).
    """
    height, width = size
    if name == "random_map":
        noise = [np.random.default_rng((seed, index)).random((height, width), np.float32) for index in indices]
        return torch.from_numpy(np.stack(noise))
    if name == "uniform_map":
        return torch.ones(len(indices), height, width)
    rows, columns = ((torch.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    squared = rows[:, None] ** 2 + columns[None, :] ** 2
    return torch.exp(-squared / (2 * GAUSSIAN_SIGMA**2)).expand(len(indices), -1, -1).clone()


def map_area(saliency: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Share of the image that maps keep: their mean after upsampling to `size`, (batch_size,)."""
    return upsample_saliency(saliency, size).mean((1, 2))


def match_area(saliency: torch.Tensor, area: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Raise each map to its own power, so that its mean after upsampling to `size` is `area`.

    The power keeps the order of the map's cells. A map of zeros and ones alone has no such power, nor has a map whose
    nonzero part is smaller than `area`: it comes as close as the powers from 1/64 to 64 allow. For an `area` of 0, that
    of an empty map, the map becomes empty.

    Args:
        saliency: (batch_size, height, width) in [0, 1].
        area: (batch_size,) in [0, 1].
    """
    weights = _mean_weights(saliency.shape[1:], size).to(saliency)
    low = torch.full_like(area, -1.0)  # the exponent's logarithm, in units of that of MAX_EXPONENT
    high = torch.full_like(area, 1.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = (_power(saliency, MAX_EXPONENT**middle) * weights).sum((1, 2))
        too_large = mean > area  # a larger exponent makes a smaller map
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    matched = _power(saliency, MAX_EXPONENT ** ((low + high) / 2))
    return torch.where((area > 0)[:, None, None], matched, 0)


def _power(saliency: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    return saliency ** exponent[:, None, None]


def _mean_weights(map_size: torch.Size, size: tuple[int, int]) -> torch.Tensor:
    """How much each cell of a map weighs in the mean of the upsampled map; upsampling is linear."""
    cells = torch.eye(map_size.numel()).view(-1, *map_size)
    return map_area(cells, size).view(map_size)


def match_norm(vector: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Pooled vectors (..., num_channels) scaled to the norm of `reference` (batch_size, num_channels)."""
    if vector.ndim == 3:  # one vector a class
        reference = reference[:, None]
    return F.normalize(vector, dim=-1) * reference.norm(dim=-1, keepdim=True)


def pool_by_mask(feature_map: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the features that a mask shows, at the norm of the mean of them all; that mean for an empty mask.

    Args:
        feature_map: (batch_size, num_channels, height, width).
        mask: (batch_size, rows, columns) in [0, 1], at any resolution.

    Returns:
        (batch_size, num_channels).
    """
    weights = F.adaptive_avg_pool2d(mask[:, None], feature_map.shape[2:])
    mean = feature_map.mean((2, 3))
    shown = (weights * feature_map).sum((2, 3))  # the norm makes up for the weights' sum
    return torch.where((weights.sum((1, 2, 3)) > 0)[:, None], match_norm(shown, mean), mean)


def confidences(probabilities: torch.Tensor, independent: bool) -> torch.Tensor:
    """Confidence of each image, (batch_size,), from its probabilities (batch_size, num_labels).

    The largest one; where classes are independent (several labels, or a single logit), the mean over classes of the
    larger of p and 1 - p, since its largest p rises with the temperature wherever it is below 1/2. Both fall as the
    temperature rises.
    """
    if independent:
        return torch.maximum(probabilities, 1 - probabilities).mean(1)
    return probabilities.amax(1)


def fit_temperature(mean_confidence, target: float) -> float:
    """The temperature T at which `mean_confidence(T)`, which falls with T, is `target`; 1/100 <= T <= 100.

    Raises:
        ValueError: there is none within these bounds.
    """
    if not mean_confidence(MAX_TEMPERATURE) <= target <= mean_confidence(1 / MAX_TEMPERATURE):
        raise ValueError(
            f"no temperature from 1/{MAX_TEMPERATURE:.0f} to {MAX_TEMPERATURE:.0f} gives GAP the mean confidence of "
            f"CA, {target:.4f}: leave out the control 'temperature'."
        )
    bound = math.log(MAX_TEMPERATURE)
    return math.exp(brentq(lambda log_t: mean_confidence(math.exp(log_t)) - target, -bound, bound, xtol=1e-12))


def shuffled_classifier(model: nn.Module, seed: int) -> nn.Module:
    """A twin of the model that shares its modules but the classifier, whose weights are shuffled among themselves."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.classifier = copy.deepcopy(model.classifier)
    weight = model.classifier.weight.detach()
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    with torch.no_grad():
        twin.classifier.weight.copy_(weight.flatten()[order].view_as(weight))
    return twin


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Spearman's correlation of maps (batch_size, height, width), ties at their mean rank; NaN where a map is flat."""
    pairs = zip(first.flatten(1).cpu(), second.flatten(1).cpu(), strict=True)
    return [
        math.nan if a.min() == a.max() or b.min() == b.max() else float(spearmanr(a, b).statistic) for a, b in pairs
    ]
