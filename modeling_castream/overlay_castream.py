"""Saliency on a photo: maps put back where they belong, colours, and the blend of the two.

Coordinates are in pixels of the original image, 0 at the left (top) edge of its first column (row): the first pixel's
centre lies at 0.5. A box is (left, top, right, bottom).
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from .preprocessing_castream import Box

# matplotlib's inferno at 0, 1/15, ..., 1: red, green, blue. It rises evenly in lightness, reads the same under the
# common colour blindnesses, and is the colour map of the evaluation's figures.
_INFERNO = np.array(
    [
        *[(0, 0, 4), (12, 8, 38), (36, 12, 79), (66, 10, 104), (93, 18, 110), (120, 28, 109), (147, 38, 103)],
        *[(174, 48, 92), (199, 62, 76), (221, 81, 58), (237, 105, 37), (248, 133, 15), (252, 165, 10)],
        *[(250, 198, 45), (242, 230, 97), (252, 255, 164)],
    ]
)
_BAND = 32  # rows at a time: what is computed between photo and overlay stays in the processor's caches


def color_map() -> np.ndarray:
    """(256, 3) uint8: the colour of the map values 0, 1/255, ..., 1."""
    values, stops = np.linspace(0, 1, 256), np.linspace(0, 1, len(_INFERNO))
    channels = [np.interp(values, stops, channel) for channel in _INFERNO.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def to_original(maps: torch.Tensor, box: Box, width: int, height: int) -> torch.Tensor:
    """Put maps of a processed image back where they belong on the original.

    Args:
        maps: (num_maps, rows, columns), in the processed image's frame.
        box: what `preprocessing_castream.visible_box` returned.

    Returns:
        (num_maps, height, width): bilinear inside the box, never beyond the values of `maps`; zero outside of it,
        where the model saw nothing.
    """
    left, top, right, bottom = box
    before, after, share, seen = _neighbours(left, right, width, maps.shape[2], maps)
    wide = torch.lerp(maps[:, :, before], maps[:, :, after], share) * seen  # (num_maps, rows, width)
    before, after, share, seen = (one.split(_BAND) for one in _neighbours(top, bottom, height, maps.shape[1], maps))
    placed = maps.new_empty(len(maps), height, width)
    for band, *rows in zip(placed.split(_BAND, dim=1), before, after, share, seen, strict=True):
        torch.lerp(wide[:, rows[0]], wide[:, rows[1]], rows[2][:, None], out=band)
        band.mul_(rows[3][:, None])
    return placed


def _neighbours(start: float, end: float, size: int, count: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where each of `size` pixels lies among `count` processed ones that stretch from `start` to `end`.

    Returns:
        Index of the processed pixel before its centre, of the one after, its way from the former to the latter
        in [0, 1], and 1 where it lies within `start` and `end`, else 0.
    """
    centers = torch.arange(size, dtype=torch.float64) + 0.5
    position = ((centers - start) / (end - start) * count - 0.5).clamp(0, count - 1)  # beyond: the nearest
    before = position.long()
    share = (position - before).to(like)
    inside = ((start <= centers) & (centers <= end)).to(like)
    return before.to(like.device), (before + 1).clamp_max(count - 1).to(like.device), share, inside


def blend(image: Image.Image, saliency: np.ndarray, box: Box | None = None, alpha: float = 0.5) -> Image.Image:
    """Lay a saliency map over its image.

    Args:
        image: RGB.
        saliency: (height, width) in [0, 1], of the image's size.
        box: what the model saw; outside of it the image is shown grey and pale instead of coloured.
        alpha: opacity of the colours, 0 (the image alone) to 1.

    Raises:
        ValueError: on an opacity outside [0, 1], or a map of another size.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 (image alone) and 1 (map alone), got {alpha}.")
    if saliency.shape != (image.height, image.width):
        raise ValueError(f"saliency must be of the image's size {(image.height, image.width)}, got {saliency.shape}.")
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    x, y = np.arange(image.width) + 0.5, np.arange(image.height)[:, None] + 0.5
    unseen_columns, unseen_rows = (x < left) | (x > right), (y < top) | (y > bottom)
    colors, rest = (alpha * color_map()).astype(np.float32), np.float32(1 - alpha)
    mixed = np.empty_like(pixels)
    for start in range(0, image.height, _BAND):
        rows = slice(start, start + _BAND)
        values = (saliency[rows].clip(0, 1) * 255).round().astype(np.uint8)
        mixed[rows] = (rest * pixels[rows] + colors[values]).round()
        unseen = unseen_columns | unseen_rows[rows]
        red, green, blue = pixels[rows][unseen].T.astype(np.float32)
        mixed[rows][unseen] = (127.5 + (red + green + blue)[:, None] / 6).round()  # dark would read as a low value
    return Image.fromarray(mixed)


class Overlay(Image.Image):
    """What `blend` makes of its arguments, when it is first looked at.

    An overlay of a 12-megapixel photo takes 36 MB and as long to make as the map itself.
    """

    _blend = None

    def __init__(self, image: Image.Image, saliency: np.ndarray, box: Box | None = None, alpha: float = 0.5):
        super().__init__()
        self._mode, self._size = "RGB", image.size
        self._blend = partial(blend, image, saliency, box, alpha)

    def load(self):
        """Make the pixels, once. All of PIL calls this before it reads any."""
        if self._blend is not None:
            self.im = self._blend().im
            self._blend = None
        return super().load()


__all__ = ["Overlay", "blend", "color_map", "to_original"]
