"""Preprocessing and labels of classifiers that come without files that say them."""

from collections import Counter
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


def labels(num_classes: int, names: Sequence[str] | None = None) -> dict:
    """`id2label` and `label2id` of the names given, or of an ImageNet classifier's, else only `num_labels`.

    Raises:
        ValueError: where there are fewer or more names than classes.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes}) if names is None else None
    if names is None and subset is None:
        return {"num_labels": num_classes}
    if subset is not None:
        info = ImageNetInfo(subset)
        names = [info.index_to_description(index) for index in range(num_classes)]
        marks = [info.index_to_label_name(index) for index in range(num_classes)]
    else:
        marks = range(num_classes)
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} labels were given for {num_classes} classes: name one for each.")
    counts = Counter(names)  # two classes of ImageNet are called "crane"
    names = [f"{name} ({mark})" if counts[name] > 1 else name for name, mark in zip(names, marks, strict=True)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
