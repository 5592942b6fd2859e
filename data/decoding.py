"""Decoding: one way from whatever holds an image to 8-bit RGB, for training, evaluation and masks alike."""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from modeling_castream.decoding_castream import decode_image

from .files import read_bytes

try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
except ImportError:  # without it Pillow cannot open HEIC
    pass

# What decoding a broken or hostile file raises; anything else is a bug and must surface.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, UnidentifiedImageError)
DECODING_ERRORS += (Image.DecompressionBombError,)
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".avif", ".heic", ".heif"),
)


@lru_cache(maxsize=1)
def readable_suffixes() -> tuple[str, ...]:
    """Those of PHOTO_SUFFIXES that this installation opens."""
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return tuple(suffix for suffix in PHOTO_SUFFIXES if suffix in known)


def open_image(value) -> Image.Image:
    """An RGB image of 8 bits, turned as the camera says; see `decode_image`.

    Args:
        value: encoded bytes, a path or address, what `datasets` yields for an image (`{"bytes", "path"}`), a PIL
            image, or an array.

    Raises:
        OSError: where it cannot be decoded, with the reason.
    """
    try:
        value = _held(value)
        return decode_image(value if isinstance(value, (bytes, Image.Image)) else np.asarray(value))
    except Exception as error:  # whatever a file system or a URL raises
        raise OSError(str(error) or type(error).__name__) from error


def _held(value):
    """Encoded bytes instead of a place; anything else as it is."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return read_bytes(str(value)) if isinstance(value, (str, Path)) else value


def read_image(value) -> torch.Tensor:
    """Decode an image to uint8 (3, height, width): the pixels of `open_image`, JPEG in half the time.

    Raises:
        One of DECODING_ERRORS: where it cannot be decoded.
    """
    data = value
    if isinstance(value, dict):
        data = value["bytes"] if value.get("bytes") is not None else read_bytes(value["path"])
    if isinstance(data, bytes) and data[:2] == b"\xff\xd8":
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:  # CMYK, or broken
            pass
    return pil_to_tensor(open_image(data))


def open_mask(value, size: tuple[int, int]) -> Image.Image:
    """A mask as an image, 255 on the object.

    Args:
        value: as for `open_image`, or an array that is positive on the object.
        size: of its image, (width, height).

    Raises:
        OSError: where it cannot be decoded.
        ValueError: where it has another size than its image.
    """
    try:
        if isinstance(value, (dict, bytes, str, Path, Image.Image)):
            mask = _held(value)
            mask = ImageOps.exif_transpose(Image.open(io.BytesIO(mask)) if isinstance(mask, bytes) else mask)
            # the values of more than 8 bits are looked at before anything scales them to nothing
            pixels = np.asarray(mask if mask.mode[0] in "IF" else mask.convert("RGB"))
        else:
            pixels = np.asarray(value)
    except Exception as error:
        raise OSError(f"mask: {type(error).__name__}: {error}") from error
    pixels = pixels.max(2) if pixels.ndim == 3 else pixels
    if pixels.shape[::-1] != size:
        found = "x".join(map(str, pixels.shape[::-1]))
        raise ValueError(f"has a mask of {found} for an image of {size[0]}x{size[1]}")
    return Image.fromarray((pixels > 0).astype(np.uint8) * 255)
