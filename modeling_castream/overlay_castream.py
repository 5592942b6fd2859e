"""Saliency on a photo: where the processor's pixels come from, colours, and the blend of the two.

Coordinates are in pixels of the original image, 0 at the left (top) edge of its first column (row): the first pixel's
centre lies at 0.5. A box is (left, top, right, bottom).
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

Box = tuple[float, float, float, float]

# matplotlib's inferno at 0, 1/15, ..., 1: red, green, blue. It rises evenly in lightness, reads the same under the
# common colour blindnesses, and is the colour map of the evaluation's figures.
_INFERNO = np.array(
    [
        *[(0, 0, 4), (12, 8, 38), (36, 12, 79), (66, 10, 104), (93, 18, 110), (120, 28, 109), (147, 38, 103)],
        *[(174, 48, 92), (199, 62, 76), (221, 81, 58), (237, 105, 37), (248, 133, 15), (252, 165, 10)],
        *[(250, 198, 45), (242, 230, 97), (252, 255, 164)],
    ]
)
# The two ramps of the test image lean into each other, so that 8-bit rounding averages out over rows and columns.
_MAIN, _CROSS = 239.0, 16.0
_BAND = 32  # rows at a time: what is computed between photo and overlay stays in the processor's caches


def color_map() -> np.ndarray:
    """(256, 3) uint8: the colour of the map values 0, 1/255, ..., 1."""
    values, stops = np.linspace(0, 1, 256), np.linspace(0, 1, len(_INFERNO))
    channels = [np.interp(values, stops, channel) for channel in _INFERNO.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def visible_box(image_processor, width: int, height: int) -> Box:
    """The part of a `width` x `height` image that the processor passes on to the model.

    The processor itself is asked, whatever it resizes, crops or pads: it is given an image whose colours spell out each
    pixel's position, and the answer is read from what it makes of them. A processor that pads gives a box beyond the
    image.

    Returns:
        (left, top, right, bottom) in pixels of the original image.
    """

    def process(image: Image.Image) -> np.ndarray:
        return np.asarray(image_processor(images=image, return_tensors="pt")["pixel_values"][0], dtype=np.float64)

    dark, bright = (
        process(Image.new("RGB", (64, 64), (value,) * 3))[:, 16:-16, 16:-16].mean((1, 2)) for value in (0, 255)
    )
    x, y = np.linspace(0, 1, width, dtype=np.float32), np.linspace(0, 1, height, dtype=np.float32)[:, None]
    bands = [
        Image.fromarray((across * x + down * y).round().astype(np.uint8))
        for across, down in ((_MAIN, _CROSS), (_CROSS, _MAIN))
    ]
    seen = process(Image.merge("RGB", [*bands, bands[0]]))
    red, green = (255 * (seen[i] - dark[i]) / (bright[i] - dark[i]) for i in (0, 1))
    determinant = _MAIN**2 - _CROSS**2
    left, right = _edges((_MAIN * red - _CROSS * green) / determinant, width)
    top, bottom = _edges(((_MAIN * green - _CROSS * red) / determinant).T, height)
    return left, top, right, bottom


def _edges(position: np.ndarray, size: int) -> tuple[float, float]:
    """Where the first column of a processed image begins and the last ends, given its pixels' position in [0, 1]."""
    if size == 1:  # all its columns show the one there is
        return 0.0, 1.0
    rows, columns = position.shape
    inner = slice(columns // 4, max(columns - columns // 4, columns // 4 + 2))  # away from edges, which filters bend
    profile = position[rows // 4 : max(rows - rows // 4, rows // 4 + 1), inner].mean(0) * (size - 1) + 0.5
    slope, first = np.polyfit(np.arange(columns)[inner], profile, 1)
    return float(first - slope / 2), float(first + slope * (columns - 0.5))


def to_original(maps: torch.Tensor, box: Box, width: int, height: int) -> torch.Tensor:
    """Put maps of a processed image back where they belong on the original.

    Args:
        maps: (num_maps, rows, columns), in the processed image's frame.
        box: what `visible_box` returned.

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


__all__ = ["Overlay", "blend", "color_map", "to_original", "visible_box"]
