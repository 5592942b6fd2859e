"""What the model sees of an image, and in which scale, through processors of every kind and size."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    ConvNextImageProcessorPil,
    DetrImageProcessor,
    EfficientNetImageProcessor,
    Owlv2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from modeling_castream import CAStreamImageProcessor
from modeling_castream.overlay_castream import to_original
from modeling_castream.preprocessing_castream import pixel_scale, visible_box
from tests.modeling_castream.tiny import tiny_model

SIZES = [(640, 480), (300, 500), (224, 224), (1200, 900), (90, 70), (31, 45)]


def square(side: int) -> dict:
    return {"height": side, "width": side}


def bit(side: int, resized: int, kind=BitImageProcessor, **options):
    return kind(size={"shortest_edge": resized}, crop_size=square(side), **options)


# (processor, share of the shorter edge that a square crop keeps, None for the whole image)
PROCESSORS = {
    "bit 28": (lambda: bit(28, 32), 28 / 32),
    "bit 32": (lambda: bit(32, 32), 1),
    "bit 224": (lambda: bit(224, 256), 224 / 256),
    "ours 28": (lambda: bit(28, 32, CAStreamImageProcessor), 28 / 32),
    "ours 224": (lambda: bit(224, 256, CAStreamImageProcessor), 224 / 256),
    "convnext 32": (lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8), 0.8),
    "convnext 224": (lambda: ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875), 0.875),
    "convnext by PIL": (lambda: ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 0.875),
    "convnext 384": (lambda: ConvNextImageProcessor(size={"shortest_edge": 384}), None),
    "vit 28": (lambda: ViTImageProcessor(size=square(28)), None),
    "vit 224": (lambda: ViTImageProcessor(size=square(224)), None),
    "siglip": (lambda: SiglipImageProcessor(size=square(64)), None),
    "efficientnet": (lambda: EfficientNetImageProcessor(size=square(64), include_top=True), None),
    "not square": (lambda: ViTImageProcessor(size={"height": 40, "width": 72}), None),
    "keeping the aspect ratio": (lambda: BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False), None),
    "one channel": (lambda: GreyProcessor(size={"shortest_edge": 32}, crop_size=square(28)), 28 / 32),
    "reversed channels": (lambda: ReversedProcessor(size={"shortest_edge": 32}, crop_size=square(28)), 28 / 32),
}


class GreyProcessor(BitImageProcessor):
    def __call__(self, images, **kwargs):
        batch = super().__call__(images, **kwargs)
        batch["pixel_values"] = batch["pixel_values"].mean(1, keepdim=True)
        return batch


class ReversedProcessor(BitImageProcessor):
    def __call__(self, images, **kwargs):
        batch = super().__call__(images, **kwargs)
        batch["pixel_values"] = batch["pixel_values"].flip(1)
        return batch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_visible_box_is_what_resizing_and_cropping_leave(kind, size):
    """By hand: a centre crop keeps its share of the shorter edge, squashing keeps all."""
    (width, height), (build, share) = size, PROCESSORS[kind]
    processor = build()
    left = top = 0.0
    if share is not None:
        left, top = (width - share * min(size)) / 2, (height - share * min(size)) / 2
    found = visible_box(processor, width, height)
    # resized sizes and crop offsets are whole pixels of the processed image
    rows, columns = processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[-2:]
    tolerance = 1.1 * max(found[2] - found[0], found[3] - found[1]) / min(rows, columns)
    if share is None:
        tolerance *= 0.5
    assert found == pytest.approx((left, top, width - left, height - top), abs=tolerance)


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (300, 900)])
def test_padding_lies_outside_of_the_image(size):
    """The longer edge fills the frame; what is padded is at the right or at the bottom, or on both sides."""
    width, height = size
    longer, pixel = max(size), max(size) / 64
    at_the_end = DetrImageProcessor(size={"longest_edge": 64, "shortest_edge": 64}, do_pad=True, pad_size=square(64))
    owl = Owlv2ImageProcessor(size=square(64))
    for processor in (at_the_end, owl):
        assert visible_box(processor, width, height) == pytest.approx((0, 0, longer, longer), abs=1.1 * pixel)
    small = CAStreamImageProcessor(size={"shortest_edge": 40}, crop_size=square(60))  # the crop is padded with zeros
    edge = 60 / 40 * min(size)
    expected = (width - edge) / 2, (height - edge) / 2, (width + edge) / 2, (height + edge) / 2
    assert visible_box(small, width, height) == pytest.approx(expected, abs=1.1 * edge / 60)


def test_little_of_a_long_image_is_found_exactly():
    """The middle 28 of 32 rows' worth of 3000 columns, with fewer than 256 shades for the whole length."""
    left, top, right, bottom = visible_box(PROCESSORS["bit 28"][0](), 3000, 20)
    assert (right - left, bottom - top) == pytest.approx((17.5, 17.5), abs=0.7)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((1500, 10), abs=0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 2), (3, 700), (5000, 4)])
@pytest.mark.parametrize("kind", ["bit 28", "convnext 32", "vit 28", "keeping the aspect ratio"])
def test_extreme_images_have_a_box_of_numbers(kind, size):
    left, top, right, bottom = visible_box(PROCESSORS[kind][0](), *size)
    assert np.isfinite([left, top, right, bottom]).all() and left < right and top < bottom
    assert left < size[0] and right > 0 and top < size[1] and bottom > 0


@pytest.mark.parametrize("side", [28, 32])
def test_small_networks_have_maps_on_the_photo(side):
    """A margin of 16 pixels left nothing of these: the box was NaN, and every map 0."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    [answer] = tiny_model().explainer(bit(side, 32))(photo, method="raw_attention", layer=0, top_k=1)
    assert answer["saliency"].max() > 0.5 and np.isfinite(answer["box"]).all()


@pytest.mark.parametrize("kind", ["bit 28", "ours 224", "vit 224", "convnext 32", "keeping the aspect ratio"])
def test_a_mark_on_the_photo_is_found_where_it_was_put(kind):
    width, height = 640, 480
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    spot = np.exp(-(((x - 0.6 * width) / 60) ** 2 + ((y - 0.45 * height) / 60) ** 2))
    photo = Image.fromarray((255 * spot).round().astype(np.uint8)).convert("RGB")
    processor = PROCESSORS[kind][0]()
    map_ = torch.as_tensor(processor(images=photo, return_tensors="pt")["pixel_values"])[0, :1]
    map_ = (map_ - map_.min()) / (map_.max() - map_.min())
    placed = to_original(map_, visible_box(processor, width, height), width, height)[0].double().numpy()
    center = (placed * x).sum() / placed.sum(), (placed * y).sum() / placed.sum()
    assert center == pytest.approx((0.6 * width, 0.45 * height), abs=0.5 * width / map_.shape[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_scale_and_offset_are_the_processor_s(options):
    mean, std = pixel_scale(bit(28, 32, **options))
    expected = options.get("image_mean", [0.0] * 3), options.get("image_std", [1.0] * 3)
    if not options.get("do_rescale", True):
        expected = [0.0] * 3, [1 / 255] * 3
    np.testing.assert_allclose(mean, expected[0], atol=1e-6)
    np.testing.assert_allclose(std, expected[1], rtol=1e-5)


def test_a_processor_that_shows_nothing_is_told():
    blind = bit(28, 32, image_std=[float("inf")] * 3)
    with pytest.raises(ValueError, match="shows the model nothing"):
        visible_box(blind, 64, 48)
    with pytest.raises(ValueError, match="shows the model nothing"):
        pixel_scale(blind)
