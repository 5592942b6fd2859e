"""Image processor of converted torchvision and timm classifiers: the pixels those classifiers were evaluated on.

Their evaluation transform resizes with PIL and centres its crop with torchvision, which rounds half a pixel to even
where transformers' processors round it down: about one photo in seven is cropped one pixel off. A saved processor says
that it is a `BitImageProcessor`, so that `AutoImageProcessor` also loads it without running this file
(`trust_remote_code=False`), at the price of that pixel.
"""

import numpy as np
from transformers import BitImageProcessorPil
from transformers.image_utils import SizeDict


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


__all__ = ["CAStreamImageProcessor"]
