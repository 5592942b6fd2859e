"""One decoder: whatever holds a picture becomes the RGB image that a viewer shows, or one line of refusal."""

import base64
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from modeling_castream.decoding_castream import decode_image

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
EXPECTED = np.round(RAMP / 257).astype(np.uint8)  # by hand: 65535 / 257 is 255


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    "value",
    [
        RAMP,
        torch.from_numpy(RAMP.astype(np.int32)),
        encoded(Image.fromarray(RAMP)),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray(RAMP.astype(">u2")),
    ],
    ids=["array", "tensor", "PNG", "TIFF", "TIFF of 32 bits", "I;16", "I", "I;16B"],
)
def test_sixteen_bits_are_scaled_to_eight(value):
    assert np.array_equal(grey(decode_image(value)), EXPECTED)


@pytest.mark.parametrize("scale", [1, 255])
def test_float_samples_go_to_one_or_to_255(scale):
    samples = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16) * scale
    expected = np.arange(256).reshape(16, 16)
    for value in (samples, encoded(Image.fromarray(samples), "TIFF"), samples.astype(np.float64)[None]):
        assert np.array_equal(grey(decode_image(value)), expected)


def test_every_holder_of_a_picture_gives_its_pixels(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels))
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = base64.b64encode(data).decode()
    holders = [path, str(path), "~/photo.png", data, bytearray(data), io.BytesIO(data), text]
    holders += [f"data:image/png;base64,{text}", Image.fromarray(pixels), pixels, pixels.astype(np.int64)]
    holders += [torch.from_numpy(pixels).permute(2, 0, 1), {"bytes": data, "path": "gone"}]
    holders += [{"bytes": None, "path": str(path)}, np.dstack([pixels, np.full((20, 30), 255, np.uint8)])]
    for holder in holders:
        assert np.array_equal(np.asarray(decode_image(holder)), pixels)


def test_transparency_lies_on_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (100, 0, 0, 51))
    expected = [[[255, 255, 255], [224, 204, 204]]]  # 0.2 * 100 + 0.8 * 255
    assert np.asarray(decode_image(rgba)).tolist() == expected
    assert np.asarray(decode_image(np.asarray(rgba))).tolist() == expected
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9, 8, 8, 8])
    for data in (encoded(palette, transparency=0), encoded(Image.new("LA", (1, 1), (0, 0)))):
        assert np.asarray(decode_image(data)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_colours_of_other_modes_are_pillow_s(mode):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8)).convert(mode)
    assert np.array_equal(np.asarray(decode_image(image)), np.asarray(image.convert("RGB")))


def test_truth_values_are_black_and_white():
    assert grey(decode_image(np.array([[True, False]]))).tolist() == [[255, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    data = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 99, 7, 1 << 30)]
)
def test_damaged_metadata_does_not_cost_the_picture(exif):
    found = decode_image(encoded(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif))
    assert found.size == (6, 4) and not found.info


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.full((2, 2), 256.0),
            "its values go from 256 to 256, and float ones must lie between 0 and 1, or 0 and 255",
        ),
        (np.full((2, 2), np.nan), "go from nan to nan"),
        (np.full((2, 2), -1), "must lie between 0 and 255, or 0 and 65535"),
        (Image.fromarray(np.full((2, 2), -0.5, np.float32)), "go from -0.5 to -0.5"),
        (np.zeros((5, 4, 5)), r"got the shape \(5, 4, 5\)"),
        (np.zeros((0, 4)), r"got the shape \(0, 4\)"),
        (np.array([["a"]]), "must hold numbers"),
        (Path("/gone/photo.jpg"), "'/gone/photo.jpg' cannot be decoded: there is no such file"),
        ({"bytes": None, "path": None}, "must be a path, a URL, bytes, .* got NoneType"),
        (b"no image", "none of the formats"),
        (b"", "none of the formats"),
        (encoded(Image.new("RGB", (90, 90), "red"))[:120], "cannot be decoded"),
        ([1, 2], "got list"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode_image(value)
    assert "\n" not in str(caught.value)


def test_more_pixels_than_pillow_opens_are_told(monkeypatch):
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match="more than 8,000 pixels"):
        decode_image(data)
