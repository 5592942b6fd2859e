"""Pixels: as the image processor makes them, from every kind of file."""

import io

import numpy as np
import pytest
import torch
from castream.data.transforms import DECODING_ERRORS, ImageTransform, decode_image
from PIL import Image
from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor


def smooth(height, width):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}, resample=3),
        ViTImageProcessor(size={"height": 40, "width": 32}, resample=2),
        ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.8, resample=2),
    ],
    ids=["bit", "vit", "convnext"],
)
@pytest.mark.parametrize("shape", [(60, 96), (96, 60)])
def test_the_evaluations_view_is_the_image_processors(processor, shape):
    pixels = smooth(*shape)  # sizes whose crop needs no rounding, which torchvision and transformers do differently
    expected = processor(Image.fromarray(pixels), return_tensors="pt", do_normalize=False)["pixel_values"][0]
    found = ImageTransform(processor, "none")(torch.from_numpy(pixels).permute(2, 0, 1)).float() / 255
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.01


def test_flips_and_crops_follow_the_seed():
    processor = BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40})
    pixels = torch.from_numpy(smooth(60, 90)).permute(2, 0, 1)
    for augmentation in ("flip", "crop"):
        transform = ImageTransform(processor, augmentation)
        views = []
        for seed in (0, 0, *range(1, 9)):
            torch.manual_seed(seed)
            views.append(transform(pixels))
        assert torch.equal(views[0], views[1]) and any(not torch.equal(views[0], view) for view in views[2:])
        assert all(view.shape == (3, 40, 40) and view.dtype == torch.uint8 for view in views)


@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG")]
)
def test_every_mode_becomes_rgb(mode, format):
    image = Image.fromarray(smooth(30, 40)).convert(mode)
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
    decoded = decode_image(encoded(image, format, **options))
    expected = torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    assert decoded.shape == (3, 30, 40) and decoded.dtype == torch.uint8
    assert (decoded.float() - expected.float()).abs().mean() < 6


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pictures_are_turned_as_the_camera_says(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_image(encoded(Image.fromarray(smooth(30, 40)), format, exif=exif)).shape == (3, 40, 30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_files_raise_what_is_counted(format):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)), format)
    for broken in (data[: len(data) // 2], data[:20], b"", b"\xff\xd8\xff", b"no image at all"):
        with pytest.raises(DECODING_ERRORS):
            decode_image(broken)
