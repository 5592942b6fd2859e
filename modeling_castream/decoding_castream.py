"""From whatever holds a picture to the RGB image that a viewer would show: one decoder for pipeline, page and data."""

import base64
import io
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
# What undoes each value of EXIF's orientation tag.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(value, timeout: float | None = None) -> Image.Image:
    """An upright RGB image of 8 bits.

    Samples of 16 bits are divided by 257, float ones multiplied by 255 where all lie in [0, 1] and taken as they are
    where all lie in [0, 255]; integers of more bits are read as 8 bits where none is above 255, else as 16.
    EXIF's orientation is followed, and transparency lies on white. Of an animation the first frame is taken.

    Args:
        value: a path, a URL or a base64 string; encoded bytes or an open binary file; a PIL image; an array or tensor
            (height, width), (height, width, channels) or (channels, height, width) of 1 to 4 channels, the last of
            2 or 4 being opacity; or what `datasets` yields undecoded, {"bytes": bytes or None, "path": str or None}.
        timeout: seconds to wait for a URL.

    Raises:
        ValueError: in one line, on what is no image, a damaged one, one of more pixels than `PIL.Image` opens, or
            samples of no known range.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return _reporting("image", lambda: _to_rgb(value))
    if isinstance(value, (str, os.PathLike)):
        name = os.fspath(value)
        return _reporting(f"image {name[:200]!r}", lambda: _decode_file(_locate(name, timeout)))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _reporting("image", lambda: _decode_file(io.BytesIO(value)))
    if hasattr(value, "read"):
        return _reporting("image", lambda: _decode_file(value))
    if hasattr(value, "__array__"):
        return _reporting("image", lambda: _to_rgb(_from_array(np.asarray(value))))
    raise ValueError(
        f"image must be a path, a URL, bytes, a file, a PIL image or an array, got {type(value).__name__}."
    )


def _reporting(name: str, decode: Callable[[], Image.Image]) -> Image.Image:
    """What `decode` returns, or one line that says why there is nothing."""
    try:
        return decode()
    except FileNotFoundError:
        reason = "there is no such file"
    except Image.DecompressionBombError:
        reason = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "it is in none of the formats that Pillow reads"
    except Exception as error:  # decoders raise whatever they meet in a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{name} cannot be decoded: {reason.removesuffix('.')}.")


def _locate(name: str, timeout: float | None) -> str | io.BytesIO:
    """What `Image.open` takes for a URL, a base64 string or a path."""
    if name.startswith(("http://", "https://")):
        import httpx  # here, since most photos are files

        return io.BytesIO(httpx.get(name, timeout=timeout, follow_redirects=True).raise_for_status().content)
    if name.startswith("data:image/"):
        return io.BytesIO(base64.b64decode(name.partition(",")[2], validate=True))
    path = os.path.expanduser(name)
    if os.path.exists(path) or "." in name or len(name) < 64:  # no image is that small, and base64 has no dots
        return path
    return io.BytesIO(base64.b64decode(name, validate=True))


def _decode_file(file) -> Image.Image:
    with Image.open(file) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits, upright, without transparency, palette or metadata."""
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # of damaged metadata; the picture itself is not
        turn = None
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}
    return image if turn is None else image.transpose(turn)


def _from_array(array: np.ndarray) -> Image.Image:
    """An image of the array's channels, in 8 bits.

    Raises:
        ValueError: on another shape, kind or range.
    """
    if array.ndim == 3 and array.shape[0] <= 4 < array.shape[2]:
        array = array.transpose(1, 2, 0)  # to channels last
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] > 4):
        raise ValueError(f"an array must be (height, width) or (height, width, channels), got the shape {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_bytes(array)))


def _to_bytes(samples: np.ndarray) -> np.ndarray:
    """Samples of any kind in 8 bits.

    Raises:
        ValueError: where their range is that of no known encoding.
    """
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == bool:
        return samples.astype(np.uint8) * 255
    if samples.dtype.kind not in "uif":
        raise ValueError(f"an array must hold numbers, got {samples.dtype}")
    low, high = samples.min(), samples.max()
    span = f"its values go from {low:.6g} to {high:.6g}"
    if samples.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN fails, too
            raise ValueError(f"{span}, and float ones must lie between 0 and 1, or 0 and 255")
        return (samples * 255 if high <= 1 else samples).round().astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"{span}, and whole ones must lie between 0 and 255, or 0 and 65535")
    if high <= 255 and samples.dtype.itemsize != 2:
        return samples.astype(np.uint8)
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


__all__ = ["decode_image"]
