"""Resizing and augmentation, on uint8 tensors, in the worker processes."""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

MASK_GRID = 4  # cells of the noise that the random masks of masked_distill are made of


class ImageTransform:
    """From a decoded image to the network's input size, as uint8.

    Args:
        image_processor: whose `size`, `crop_size` and `resample` the evaluation's view follows.
        augmentation: `"none"`: that view; `"flip"`: and a random flip; `"crop"`: a random resized crop and flip.
    """

    def __init__(self, image_processor, augmentation: str):
        self.size, crop = _sizes(image_processor)
        interpolation = InterpolationMode(Image.Resampling(image_processor.resample or 2).name.lower())
        if augmentation == "crop":
            steps = [transforms.RandomResizedCrop(crop or self.size, interpolation=interpolation, antialias=True)]
        else:
            steps = [transforms.Resize(self.size, interpolation=interpolation, antialias=True)]
            steps += [transforms.CenterCrop(crop)] if crop else []
        if augmentation in ("flip", "crop"):
            steps.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose(steps)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (3, height, width) of any size -> uint8 (3, crop height, crop width), in any memory layout."""
        return self.transform(image)


def _sizes(image_processor) -> tuple[int | list[int], list[int] | None]:
    """torchvision's arguments for a processor's resizing and cropping."""
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


def random_mask_noise(generator: torch.Generator) -> torch.Tensor:
    """What a sample's random mask is made from: normal noise (MASK_GRID, MASK_GRID)."""
    return torch.randn(MASK_GRID, MASK_GRID, generator=generator)
