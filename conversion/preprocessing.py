"""Preprocessing and labels of classifiers that come without files that say them."""

from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset
from transformers.image_utils import PILImageResampling

from modeling_castream import CAStreamImageProcessor


def image_processor(
    resize: Sequence[int], crop: Sequence[int], interpolation: str, mean: Sequence[float], std: Sequence[float]
) -> CAStreamImageProcessor:
    """The image processor of an evaluation transform of torchvision or timm.

    Args:
        resize: [shortest edge] or [height, width], in pixels.
        crop: (height, width).
        interpolation: name of a PIL filter, `"bilinear"` for instance.
        mean, std: per channel, of pixels in [0, 1].
    """
    return CAStreamImageProcessor(
        size={"shortest_edge": resize[0]} if len(resize) == 1 else {"height": resize[0], "width": resize[1]},
        resample=PILImageResampling[interpolation.upper()],
        crop_size={"height": crop[0], "width": crop[1]},
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


def labels(num_classes: int) -> dict:
    """`id2label` and `label2id` of an ImageNet classifier, else only `num_labels`."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return {"num_labels": num_classes}
    info = ImageNetInfo(subset)
    names = [info.index_to_description(index) for index in range(num_classes)]
    repeated = {name for name in names if names.count(name) > 1}  # two classes of ImageNet are called "crane"
    names = [
        f"{name} ({info.index_to_label_name(index)})" if name in repeated else name for index, name in enumerate(names)
    ]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
