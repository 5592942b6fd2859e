"""Resizing, cropping and flipping: as the image processor does it, and as the seed says."""

import numpy as np
import pytest
import torch
from castream.data.transforms import ImageTransform, pixel_statistics
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
)


def smooth(height, width):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


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
    "processor",
    [
        LevitImageProcessor(size={"shortest_edge": 224}),  # resizes to 256 first
        MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),  # BGR
        BitImageProcessor(size={"longest_edge": 48}, crop_size={"height": 40, "width": 40}),
    ],
    ids=["levit", "mobilevit", "longest edge"],
)
def test_a_processor_that_does_something_else_is_refused(processor):
    with pytest.raises(
        ValueError, match=f"^{type(processor).__name__} prepares images in a way that training does not"
    ):
        ImageTransform(processor, "crop")


def test_statistics_are_those_that_count():
    written = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    options = {"size": {"shortest_edge": 48}, "image_mean": written[0], "image_std": written[1]}
    assert tuple(map(list, pixel_statistics(BitImageProcessor(**options)))) == written  # to the digit
    for found, expected in zip(pixel_statistics(BitImageProcessor(**options, do_normalize=False)), (0, 1), strict=True):
        np.testing.assert_allclose(found, [expected] * 3, atol=1e-6)
