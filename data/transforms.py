"""Resizing and augmentation, on uint8 tensors, in the worker processes, as the image processor does it to one image.

Workers hand on uint8, a quarter of what a processor returns, so its options are read here; what comes of them is
compared with what the processor does.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from modeling_castream.preprocessing_castream import pixel_scale, process

MASK_GRID = 4  # cells of the noise that the random masks of masked_distill are made of


class ImageTransform:
    """From a decoded image to the network's input size, as uint8.

    Args:
        image_processor: whose `size`, `crop_size` and `resample` the evaluation's view follows.
        augmentation: `"none"`: that view; `"flip"`: and a random flip; `"crop"`: a random resized crop and flip.

    Raises:
        ValueError: where the processor shows the network something else than these options say.
    """

    def __init__(self, image_processor, augmentation: str):
        self.size, crop = _sizes(image_processor)
        interpolation = InterpolationMode(
            Image.Resampling(getattr(image_processor, "resample", None) or 2).name.lower()
        )
        steps = [transforms.Resize(self.size, interpolation=interpolation, antialias=True)]
        steps += [transforms.CenterCrop(crop)] if crop else []
        _compare(transforms.Compose(steps), image_processor)
        if augmentation == "crop":
            steps = [transforms.RandomResizedCrop(crop or self.size, interpolation=interpolation, antialias=True)]
        if augmentation in ("flip", "crop"):
            steps.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose(steps)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (3, height, width) of any size -> uint8 (3, crop height, crop width), in any memory layout."""
        return self.transform(image)


def pixel_statistics(image_processor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in [0, 1]: as the processor has them written, where these are
    what it does, else as they are measured."""
    measured = pixel_scale(image_processor, 3)
    written = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    pairs = zip(written, measured, strict=True)
    same = all(value is not None and np.allclose(value, found, atol=1e-5) for value, found in pairs)
    return written if same else measured


def _sizes(image_processor) -> tuple[int | list[int], list[int] | None]:
    """torchvision's arguments for a processor's resizing and cropping."""
    try:
        size = dict(image_processor.size)
        crop = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else None
        crop_pct = getattr(image_processor, "crop_pct", None)
        if size.get("height"):
            resized = [size["height"], size["width"]]
        elif crop_pct and size["shortest_edge"] < 384:  # ConvNeXt's processor: resize to more, then crop to the size
            crop = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
            resized = int(size["shortest_edge"] / crop_pct)
        elif crop_pct:
            resized = [size["shortest_edge"]] * 2
        else:
            resized = size["shortest_edge"]
        return resized, [crop["height"], crop["width"]] if crop else None
    except (KeyError, TypeError, AttributeError):
        raise _refusal(image_processor) from None


def _compare(view: transforms.Compose, image_processor) -> None:
    """Refuse a processor that makes something else of an image than `view` does."""
    down, across = np.mgrid[0:256, 0:320]
    image = np.stack([down, across * 255 // 319, 255 - down], axis=-1).astype(np.uint8)  # places can be read from it
    found = view(torch.from_numpy(image).permute(2, 0, 1)).numpy() / 255
    mean, std = (np.array(value)[:, None, None] for value in pixel_scale(image_processor, 3))
    expected = process(image_processor, Image.fromarray(image))
    # a pixel more or less, since crops of half pixels are rounded in two ways
    if expected.shape != found.shape or np.abs(expected * std + mean - found).max() > 0.01 + 1.5 / min(found.shape[1:]):
        raise _refusal(image_processor)


def _refusal(image_processor) -> ValueError:
    return ValueError(
        f"{type(image_processor).__name__} prepares images in a way that training does not: use an image processor "
        "that resizes to one size, or by the shortest edge and then crops the centre."
    )


def random_mask_noise(generator: torch.Generator) -> torch.Tensor:
    """What a sample's random mask is made from: normal noise (MASK_GRID, MASK_GRID)."""
    return torch.randn(MASK_GRID, MASK_GRID, generator=generator)
