"""A strip of saliency maps: what a model that is being trained looks at, on a few images that stay the same."""

import numpy as np
import torch
from PIL import Image

from modeling_castream import explain
from modeling_castream.overlay_castream import blend

STRIP_IMAGES = 8


def draw_strip(objective, pixel_values: torch.Tensor) -> np.ndarray:
    """Draw three rows: the images, the attention of the last block, and attention_cam for the predicted class.

    Args:
        objective: an Objective, whose model is left as it was.
        pixel_values: (num_images, 3, height, width), normalised.

    Returns:
        (3 * height, num_images * width, 3), uint8.
    """
    images = (pixel_values * objective.std + objective.mean).clamp(0, 1)
    pictures = [to_pil(image) for image in images]
    rows = [pictures]
    for method in ("raw_attention", "attention_cam"):
        maps = explain(objective.model, pixel_values, method=method, pooling="ca").cpu().numpy()
        rows.append([blend(picture, saliency) for picture, saliency in zip(pictures, maps, strict=True)])
    return np.concatenate([np.concatenate([np.asarray(picture.convert("RGB")) for picture in row], 1) for row in rows])


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] as a picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
