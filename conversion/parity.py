"""Proof that a converted model is its source: the same pixels, and the same logits under its own readout."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from modeling_castream.backbone_castream import num_input_channels
from modeling_castream.preprocessing_castream import image_mode

from .source import Source

TOLERANCE = 1e-5
_SIZES = ((500, 375), (375, 500), (341, 288), (640, 427))  # (width, height) of common photos, and of an odd crop


@dataclass
class Parity:
    """Largest absolute differences between a source and its conversion.

    `logits` is absolute; where the source's logits exceed 1 in size the bound is `TOLERANCE` times the largest of them.
    """

    logits: float
    largest_logit: float
    pixels: float


def example_images() -> list[Image.Image]:
    """Pictures with edges, smooth parts and texture, in the sizes of photos; always the same."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in _SIZES:
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        waves = [np.sin(40 * rng.random() * x + 40 * rng.random() * y + 6 * rng.random()) for _ in range(3)]
        picture = 0.5 + 0.3 * np.stack(waves, -1) + 0.08 * rng.standard_normal((height, width, 3))
        disc = (x - rng.random() / 2) ** 2 + (y - rng.random() / 2) ** 2 < 0.04
        picture[disc] = rng.random(3)
        images.append(Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8)))
    return images


@torch.no_grad()
def check_parity(
    source: Source,
    model: nn.Module,
    image_processor: BaseImageProcessor,
    renamed: dict[str, list[str]],
    images: list[Image.Image] | None = None,
) -> Parity:
    """Compare a source with its conversion on a random and a real batch, at the source's own resolution.

    Args:
        model, image_processor: the conversion.
        renamed: new names of the source's weights, as `mapping.rename` found them.
        images: real images; None: `example_images()`. A processor of one or four channels gets them grey, or with an
            alpha channel.

    Raises:
        ValueError: where pixels differ by more than 1e-5, or logits by more than 1e-5 times max(1, largest logit).
    """
    mode = image_mode(image_processor, num_input_channels(model.config))
    images = [image.convert(mode) for image in (example_images() if images is None else images)]
    batches, pixels = [], 0.0
    for image in images:  # by themselves: a processor that keeps the aspect ratio gives each its own size
        try:
            batches.append(source.transform([image]))
            ours = torch.as_tensor(np.stack(image_processor(images=[image])["pixel_values"]))
        except RuntimeError as error:  # torchvision's, of channels that do not fit
            raise ValueError(f"the image processor makes no pixels of a picture in mode {mode}: {error}") from None
        same_size = ours.shape == batches[-1].shape
        pixels = max(pixels, (batches[-1] - ours).abs().max().item() if same_size else float("inf"))
    if not pixels <= TOLERANCE:
        raise ValueError(f"the image processors differ by {pixels:.2g} in pixel values, more than {TOLERANCE:g}.")
    if len({batch.shape for batch in batches}) == 1:
        batches = [torch.cat(batches)]
    noise = torch.randn(2, *batches[0].shape[1:], generator=torch.Generator().manual_seed(0))
    difference = largest = 0.0
    for batch in (noise, *batches):
        expected, found = source.logits(batch), model(batch, pooling="source").logits
        error, scale = (expected - found).abs().max().item(), expected.abs().max().item()
        if not error <= TOLERANCE * max(1.0, scale):
            where = first_difference(source, model, renamed, batch)
            raise ValueError(f"the converted model's logits differ from the source's by {error:.2g}: {where}.")
        difference, largest = max(difference, error), max(largest, scale)
    return Parity(difference, largest, pixels)


def _record(inputs: dict[str, torch.Tensor], name: str, module: nn.Module, args: tuple) -> None:
    if args and isinstance(args[0], torch.Tensor):
        inputs[name] = args[0].flatten().sort().values  # whatever the order of the axes


def _layer_inputs(model: nn.Module, names: set[str], *arguments) -> dict[str, torch.Tensor]:
    """Sorted inputs of the named submodules, in the order in which they run."""
    inputs = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(_record, inputs, name)) for name in names]
    try:
        model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def first_difference(
    source: Source, model: nn.Module, renamed: dict[str, list[str]], pixel_values: torch.Tensor
) -> str:
    """Say which layer with weights is the first whose input differs between a source and its conversion.

    Inputs, as some networks count the activation behind a layer as a part of it and others do not.
    """
    pairs = {name.rpartition(".")[0]: targets[0].rpartition(".")[0] for name, targets in renamed.items()}
    theirs = _layer_inputs(source.model, set(pairs), *source.arguments(pixel_values))
    ours = _layer_inputs(model, set(pairs.values()), pixel_values)
    previous = "the image"
    for name, expected in theirs.items():
        value = ours.get(pairs[name])
        between = f"first between {previous} and {name} ({pairs[name]})"
        if value is None:
            return f"{between}, which the converted model does not run"
        if value.shape != expected.shape:
            return f"{between}, whose input has another shape"
        difference = (value - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            return f"{between}, whose input differs by {difference:.2g}"
        previous = name
    return f"first after {previous}"
