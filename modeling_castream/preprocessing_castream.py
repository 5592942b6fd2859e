"""What an image processor does to an image, found by asking it: its scale and offset, its size, what it shows.

No option of a processor is read: families call them differently, and combine resizing, cropping, padding and rounding
in their own ways. What becomes of black, white and two ramps says all of it.

Coordinates are in pixels of the original image, 0 at the left (top) edge of its first column (row): the first pixel's
centre lies at 0.5. A box is (left, top, right, bottom).
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]


MODES = ("RGB", "L", "RGBA")  # of pictures, in the order in which a processor is asked whether it takes them


def image_mode(image_processor, num_channels: int | None = None) -> str:
    """The kind of picture that a processor takes: RGB, else grey or with an alpha channel.

    Where it takes none of them, RGB: what is wrong with the processor shows when it is used.

    Args:
        num_channels: of the network's input that it must make; None: of any.
    """
    for mode in MODES:
        try:
            found = len(process(image_processor, Image.new(mode, (256, 256))))
        except Exception:  # processors have no error in common for a wrong number of channels
            continue
        # transformers 5.17 spreads a grey picture over any number of channels
        if num_channels in (None, found) and found <= len(mode):
            return mode
    return "RGB"


def process(image_processor, image: Image.Image) -> np.ndarray:
    """The network's input for one image: (num_channels, height, width), float64."""
    return np.asarray(image_processor(images=image, return_tensors="pt")["pixel_values"][0], dtype=np.float64)


def pixel_scale(image_processor, num_channels: int | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel: the network's input is (image - mean) / std for an image in [0, 1].

    In single precision, as the processor computes.

    Args:
        num_channels: as in `image_mode`.

    Raises:
        ValueError: where the input is the same for a black and for a white image.
    """
    mode = image_mode(image_processor, num_channels)
    low, high = (one.astype(np.float32) for one in _black_and_white(image_processor, mode))
    return (-low / (high - low)).tolist(), (1 / (high - low)).tolist()


def picture(pixels: np.ndarray, mode: str) -> Image.Image:
    """An image with the same values, uint8 (height, width), in every channel of its mode."""
    return Image.merge(mode, [Image.fromarray(pixels)] * len(mode)) if mode != "L" else Image.fromarray(pixels)


def _black_and_white(image_processor, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of a black and of a white pixel, each (num_channels,)."""
    black, white = (process(image_processor, picture(np.full((256, 256), v, np.uint8), mode)) for v in (0, 255))
    span = np.abs(white - black).min(0)
    if not (np.isfinite(span).all() and span.max() > 0):
        raise ValueError("image_processor shows the model nothing: white is processed as black is.")
    row, column = np.unravel_index(span.argmax(), span.shape)  # no padding
    return black[:, row, column], white[:, row, column]


def visible_box(image_processor, width: int, height: int) -> Box:
    """Where the network's input lies on a `width` x `height` image, as the processor resizes, crops and pads it.

    A processor that pads gives a box beyond the image.

    Returns:
        (left, top, right, bottom) in pixels of the original image.

    Raises:
        ValueError: where the processor shows nothing of an image.
    """
    mode = image_mode(image_processor)
    low, high = (one[:, None, None] for one in _black_and_white(image_processor, mode))

    def shown(ramp: np.ndarray) -> np.ndarray:
        """Processed values in [0, 1], (rows, columns), of an image of these: (1, width) or (height, 1)."""
        pixels = np.broadcast_to((255 * ramp.clip(0, 1)).round().astype(np.uint8), (height, width))
        return ((process(image_processor, picture(pixels, mode)) - low) / (high - low)).mean(0)

    x, y = np.linspace(0, 1, width)[None], np.linspace(0, 1, height)[:, None]
    shown_x, shown_y = shown(x), shown(y)
    rows, columns = _varying(np.ptp(shown_x, axis=1)), _varying(np.ptp(shown_y, axis=0))
    middle_rows, middle_columns = _middle(rows), _middle(columns)
    across = _sharpen(lambda image: image[middle_rows].mean(0)[columns], shown, shown_x, x)
    down = _sharpen(lambda image: image[:, middle_columns].mean(1)[rows], shown, shown_y, y)
    left, right = _edges(across, columns, shown_x.shape[1], width)
    top, bottom = _edges(down, rows, shown_x.shape[0], height)
    return left, top, right, bottom


def _varying(ranges: np.ndarray) -> np.ndarray:
    """Indices of the rows (columns) that show the image: along padding nothing varies.

    Args:
        ranges: per row (column), how much varies along it of a ramp from 0 to 1.
    """
    flat = ranges.max() < 1e-3  # the image is a pixel wide, or very little of it is seen
    return np.arange(len(ranges)) if flat else np.flatnonzero(ranges > ranges.max() / 2)


def _sharpen(profile: Callable, shown: Callable, image: np.ndarray, ramp: np.ndarray) -> np.ndarray:
    """Positions in [0, 1] along an axis; where little of it is seen, 8 bits are spent on that little anew.

    Args:
        profile: takes the positions out of a processed image.
        shown: processes a ramp.
        image: the processed `ramp`.
    """
    found = profile(image)
    start, end = found.min() - 2 / 255, found.max() + 2 / 255
    if end - start > 1 / 8:
        return found
    return start + profile(shown((ramp - start) / (end - start))) * (end - start)


def _middle(indices: np.ndarray) -> np.ndarray:
    """The middle half, at least two if there are: away from edges, which filters bend."""
    count = len(indices)
    return indices[count // 4 : max(count - count // 4, count // 4 + 2)]


def _edges(profile: np.ndarray, seen: np.ndarray, count: int, size: int) -> tuple[float, float]:
    """Where the first column of a processed image begins and its last one ends on the original.

    Args:
        profile: position in [0, 1] of the original's pixel centres, per column in `seen`.
        count: columns of the processed image.
        size: columns of the original.
    """
    if len(seen) == 1 or size == 1:  # all of the image lies there
        slope = size / len(seen)
        first = size / 2 - slope * seen.mean()
    else:
        middle = _middle(np.arange(len(seen)))
        slope, first = np.polyfit(seen[middle], profile[middle] * (size - 1) + 0.5, 1)
    if slope <= 0:  # one pixel of the original, enlarged
        slope = 1 / count
        first -= slope * seen.mean()
    return float(first - slope / 2), float(first + slope * (count - 0.5))


__all__ = ["Box", "image_mode", "picture", "pixel_scale", "process", "visible_box"]
