"""Decoding: every kind of file becomes the same 8-bit RGB for training and evaluation, or raises what is counted."""

import io
import zipfile

import fsspec
import numpy as np
import pytest
import torch
from castream.data.decoding import DECODING_ERRORS, open_image, open_mask, read_image
from PIL import Image


def smooth(height, width):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG")]
)
def test_every_mode_becomes_rgb(mode, format):
    image = Image.fromarray(smooth(30, 40)).convert(mode)
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
    decoded = read_image(encoded(image, format, **options))
    expected = torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    assert decoded.shape == (3, 30, 40) and decoded.dtype == torch.uint8
    assert (decoded.float() - expected.float()).abs().mean() < 6


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pictures_are_turned_as_the_camera_says(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read_image(encoded(Image.fromarray(smooth(30, 40)), format, exif=exif)).shape == (3, 40, 30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_files_raise_what_is_counted(format):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)), format)
    for broken in (data[: len(data) // 2], data[:20], b"", b"\xff\xd8\xff", b"no image at all"):
        with pytest.raises(DECODING_ERRORS):
            read_image(broken)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_training_and_evaluation_see_the_same_pixels(format):
    data = encoded(Image.fromarray(smooth(61, 83)), format)
    expected = torch.from_numpy(np.array(open_image(data))).permute(2, 0, 1)
    assert torch.equal(read_image({"bytes": data, "path": None}), expected)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_to_eight(mode):
    ramp = np.linspace(0, 65535, 50, dtype=np.uint16).reshape(5, 10)
    image = Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32))
    data = encoded(image, "PNG")
    expected = np.round(ramp / 65535 * 255).astype(np.uint8)
    assert np.array_equal(read_image(data)[0].numpy(), expected)
    assert np.array_equal(np.asarray(open_image(data))[..., 1], expected)
    assert np.array_equal(np.asarray(open_image(ramp))[..., 2], expected)


def test_images_come_from_paths_archives_and_addresses(tmp_path):
    data = encoded(Image.fromarray(smooth(30, 40)), "PNG")
    (tmp_path / "a::b [v1].png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat/1.png", data)
    fsspec.filesystem("memory").pipe("/decoding/1.png", data)
    expected = torch.from_numpy(smooth(30, 40).copy()).permute(2, 0, 1)
    places = (tmp_path / "a::b [v1].png", f"zip://cat/1.png::{tmp_path}/photos.zip", "memory://decoding/1.png")
    for place in map(str, places):
        assert torch.equal(read_image({"bytes": None, "path": place}), expected)
        assert open_image(place).size == (40, 30)
    for gone in (tmp_path / "gone.png", f"zip://cat/2.png::{tmp_path}/photos.zip", "memory://decoding/2.png"):
        with pytest.raises(OSError):
            open_image(str(gone))


def test_a_mask_of_sixteen_bits_may_hold_small_numbers():
    pixels = np.zeros((4, 6), np.uint16)
    pixels[1, 2:4] = 1
    for value in (encoded(Image.fromarray(pixels), "PNG"), pixels, pixels > 0):
        assert np.array_equal(np.asarray(open_mask(value, (6, 4))), (pixels > 0) * np.uint8(255))
