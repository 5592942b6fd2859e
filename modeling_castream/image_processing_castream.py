"""Image processors of converted classifiers: the pixels those classifiers were evaluated on.

The evaluation transform of torchvision's and timm's resizes with PIL and centres its crop with torchvision, which
rounds half a pixel to even where transformers' processors round it down: about one photo in seven is cropped one pixel
off. A saved processor says that it is a `BitImageProcessor`, so that `AutoImageProcessor` also loads it without running
this file (`trust_remote_code=False`), at the price of that pixel.

SigLIP 2's processor cuts images into lists of patches. Ours puts them together again: a CA-Stream model reads images.
"""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature, BitImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.utils import is_torchvision_available, requires_backends

if is_torchvision_available():
    from transformers import Siglip2ImageProcessor
else:  # other models load without it, and without transformers' warning about this class
    Siglip2ImageProcessor = BaseImageProcessor


class CAStreamImageProcessor(BitImageProcessorPil):
    """Resize with PIL, crop the centre as torchvision does, rescale to [0, 1], normalise.

    Takes the arguments of transformers' `BitImageProcessor`.
    """

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Crop (num_channels, height, width) around its centre; an image smaller than the crop is padded with zeros."""
        height, width = image.shape[1:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)  # half to even, as torchvision
        return image[:, top : top + size.height, left : left + size.width]

    def to_dict(self) -> dict:
        """The options, under the name of the transformers class that can stand in for this one."""
        return super().to_dict() | {"image_processor_type": "BitImageProcessor"}


def join_patches(cut: Mapping, patch_size: int) -> list[torch.Tensor]:
    """Images (num_channels, height, width) out of what `Siglip2ImageProcessor` makes of them.

    Args:
        cut: `pixel_values`, per image (max_num_patches, patch_size * patch_size * num_channels), row by row, then
            padding; and `spatial_shapes`, per image (num_rows, num_columns).
        patch_size: side of a patch, in pixels.

    Raises:
        ValueError: on what another image processor makes.
    """
    if "spatial_shapes" not in cut:
        raise ValueError("the image processor cuts no patches: SigLIP 2 goes with a Siglip2ImageProcessor.")
    images = []
    for patches, (rows, columns) in zip(cut["pixel_values"], cut["spatial_shapes"], strict=True):
        grid = torch.as_tensor(patches)[: rows * columns].unflatten(0, (rows, columns))
        grid = grid.unflatten(2, (patch_size, patch_size, -1))
        images.append(grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2))
    return images


class CAStreamPatchImageProcessor(Siglip2ImageProcessor):
    """Resize, rescale and normalise as `Siglip2ImageProcessor`, whose arguments it takes, but return whole images.

    Images keep their aspect ratio: height and width are multiples of `patch_size`, and differ from photo to photo.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the name and the kind are transformers'

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def preprocess(self, images, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """`pixel_values`, per image (num_channels, height, width), neither padded nor cut into patches."""
        whole = join_patches(super().preprocess(images, **kwargs), kwargs.get("patch_size") or self.patch_size)
        return BatchFeature({"pixel_values": whole}, tensor_type=return_tensors)


__all__ = ["CAStreamImageProcessor", "CAStreamPatchImageProcessor", "join_patches"]
