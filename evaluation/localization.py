"""Does the saliency lie on the object? Per-image numbers from a map and the object's mask.

Maps are (batch_size, height, width), not negative; masks are boolean, of the same shape, with at least one pixel an
image. The flat map, which points nowhere, is defined: an all-zero map has mask share 0 and sparsity 1, and a map whose
values are all equal is a miss in the pointing game.
"""

import torch


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
    several equal maxima the last by index counts, the first of `evaluation.perturbation.pixel_order`.

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


def sparsity(saliency: torch.Tensor) -> torch.Tensor:
    """Maximum over mean of the map, (batch_size,) float64, at least 1 and unbounded by any scale; 1 for a flat map.

    Source: Gomez et al., arXiv:2201.13291.
    """
    _check(saliency)
    values = saliency.double().flatten(1)
    mean = values.mean(dim=1)
    # the mean of equal values can round to just above them
    return torch.where(mean > 0, values.amax(dim=1) / mean, torch.ones_like(mean)).clamp(min=1)


def box_mask(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (batch_size, height, width) of boxes (batch_size, 4): x0, y0, x1, y1 in pixels of an image of `size` =
    (height, width). A pixel is inside if its centre is."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}: give (batch_size, 4) as x0, y0, x1, y1")
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = torch.arange(size[0], device=boxes.device) + 0.5
    columns = torch.arange(size[1], device=boxes.device) + 0.5
    inside_rows = (rows >= y0[:, None]) & (rows < y1[:, None])
    inside_columns = (columns >= x0[:, None]) & (columns < x1[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]


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
