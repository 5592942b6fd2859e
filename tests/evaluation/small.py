"""A small classifier, its image processor and examples, for tests of the evaluation."""

import numpy as np
import torch
from castream.evaluation.intervals import Interval, mean_intervals
from castream.evaluation.masking import deletion_end, inner_points, insertion_start
from PIL import Image

from modeling_castream import CAStreamImageProcessor
from tests.modeling_castream.tiny import tiny_model

SIZE = 64
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def small_processor() -> CAStreamImageProcessor:
    """Resize to 64 and crop 64 x 64."""
    return CAStreamImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )


def small_model(**kwargs):
    """Random weights, logits spread far enough for probabilities to differ."""
    model = tiny_model(**kwargs)
    model.classifier.weight.data *= 8
    return model


def small_image(seed: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    """Smooth noise, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def small_examples(count: int = 10, num_labels: int = 5) -> list[dict]:
    """Rows with labels and masks."""
    mask = np.zeros((72, 80), bool)
    mask[10:40, 20:60] = True
    return [
        {"id": f"image-{index}", "image": small_image(index), "label": index % num_labels, "mask": mask}
        for index in range(count)
    ]


def curve_images(metric: str, pixel_values, order, protocol: str = "reference", points_per_chunk: int = 1):
    """Every image of an insertion or deletion curve, (points, batch_size, num_channels, height, width), as it is run:
    the ends that all maps share, and what `inner_points` makes between them."""
    start = insertion_start(pixel_values, protocol)
    ends = {"insertion": (start, pixel_values), "deletion": (pixel_values, deletion_end(pixel_values, start, protocol))}
    first, last = ends[metric]
    return torch.cat([first[None], *inner_points(first, last, order, points_per_chunk), last[None]])


def mean_interval(values, **options) -> Interval:
    """The interval of one figure."""
    return mean_intervals(np.asarray(values, np.float64)[:, None], **options)[0]
