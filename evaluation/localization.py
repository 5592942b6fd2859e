"""Does the saliency lie on the object? Per-image numbers from a map and the object's mask, drawn or of its boxes.

Maps are (batch_size, height, width), not negative; masks are boolean, of the same shape, with at least one pixel an
image. The flat map, which points nowhere, is defined: an all-zero map has mask share 0 and sparsity 1, and a map whose
values are all equal is a miss in the pointing game.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F


def mask_share(saliency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of the saliency's mass inside the mask, (batch_size,) float64 in [0, 1]; 0 for an all-zero map.

    Source: Wang et al., Score-CAM, arXiv:1910.01279, "energy-based pointing game", with a mask for its box.
    """
    _check(saliency, mask)
    mass = saliency.double()
    total = mass.sum(dim=(1, 2))
    inside = (mass * mask).sum(dim=(1, 2))
    return torch.where(total > 0, inside / total, torch.zeros_like(total))


def pointing_hit(saliency: torch.Tensor, mask: torch.Tensor, tolerance: float = 0) -> torch.Tensor:
    """Whether the map's maximum lies on the object, (batch_size,) bool.

    The maximum is a hit if a pixel of the mask is within `tolerance` pixels of it (Euclidean; the paper uses 15). Of
    several equal maxima the last by index counts, the first of `masking.pixel_order`.

    Source: Zhang et al., Top-down neural attention by excitation backprop, arXiv:1608.00507.
    """
    _check(saliency, mask)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: give a distance of 0 pixels or more")
    height, width = saliency.shape[1:]
    flat = saliency.flatten(1)
    peak = height * width - 1 - flat.flip(1).argmax(dim=1)
    rows = torch.arange(height, device=saliency.device) - (peak // width)[:, None]
    columns = torch.arange(width, device=saliency.device) - (peak % width)[:, None]
    near = rows[:, :, None] ** 2 + columns[:, None, :] ** 2 <= tolerance**2
    return (near & mask).flatten(1).any(dim=1) & (flat.amax(dim=1) > flat.amin(dim=1))


def pixel_precision(saliency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average precision of the pixels as the map ranks them, (batch_size,) float64 in [0, 1].

    The mean, over the mask's pixels, of the mask's share among all pixels that are at least as salient. Pixels of equal
    saliency share one threshold, so a flat map has the mask's share of the image.

    Source: Choe et al., arXiv:2001.07437, "PxAP". Differs from paper: per image, not over the pixels of all images.
    """
    _check(saliency, mask)
    ascending, order = saliency.flatten(1).sort(dim=1)
    inside = mask.flatten(1).gather(1, order).double()
    place = torch.arange(ascending.shape[1], device=saliency.device)
    starts = F.pad(ascending[:, 1:] != ascending[:, :-1], (1, 0), value=True)
    first = torch.where(starts, place, 0).cummax(dim=1).values  # of the equally salient pixels
    pixels = (ascending.shape[1] - first).double()
    inside_above = inside.flip(1).cumsum(1).flip(1).gather(1, first)
    return (inside * inside_above / pixels).sum(1) / inside.sum(1)


def sparsity(saliency: torch.Tensor) -> torch.Tensor:
    """Maximum over mean of the map, (batch_size,) float64, at least 1 and unbounded by any scale; 1 for a flat map.

    Source: Gomez et al., arXiv:2201.13291.
    """
    _check(saliency)
    values = saliency.double().flatten(1)
    mean = values.mean(dim=1)
    # the mean of equal values can round to just above them
    return torch.where(mean > 0, values.amax(dim=1) / mean, torch.ones_like(mean)).clamp(min=1)


def box_mask(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """The pixels of an image of `size` = (height, width) inside any of its boxes, boolean; a pixel is if its centre is.

    Args:
        boxes: (num_boxes, 4): x0, y0, x1, y1 in pixels of the upright image.

    Raises:
        ValueError: on another shape, or a box whose second corner is not to the lower right of its first.
    """
    corners = np.asarray(boxes, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes has shape {corners.shape}: give (num_boxes, 4) as x0, y0, x1, y1 in pixels")
    x0, y0, x1, y1 = corners.T[:, :, None]
    if not ((x0 < x1) & (y0 < y1)).all():
        raise ValueError(f"boxes holds {corners.tolist()}: give x0 < x1 and y0 < y1 in pixels, not width and height")
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    inside_rows, inside_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).any(0)


def _check(saliency: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if saliency.ndim != 3:
        raise ValueError(f"saliency has shape {tuple(saliency.shape)}: give (batch_size, height, width)")
    if not (torch.isfinite(saliency) & (saliency >= 0)).all():
        raise ValueError("saliency holds negative, NaN or infinite values: give maps in [0, 1]")
    if mask is None:
        return
    if mask.shape != saliency.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype} but saliency has shape "
            f"{tuple(saliency.shape)}: give a boolean mask of the maps' size"
        )
    empty = (~mask.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask of item {empty[0]} has no pixel: leave out images without an object")
