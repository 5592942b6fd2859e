"""Proof that a converted model is its source: the same pixels, and the same logits under global average pooling."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

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
    source: Source, model: nn.Module, renamed: dict[str, list[str]], images: list[Image.Image] | None = None
) -> Parity:
    """Compare a source with its conversion on a random and a real batch, at the source's own resolution.

    Args:
        renamed: new names of the source's weights, as `mapping.rename` found them.
        images: the real batch, RGB; None: `example_images()`.

    Raises:
        ValueError: where pixels differ by more than 1e-5, or logits by more than 1e-5 times max(1, largest logit).
    """
    images = example_images() if images is None else images
    pixel_values = source.transform(images)
    ours = torch.as_tensor(np.stack(source.image_processor(images=images)["pixel_values"]))
    pixels = (pixel_values - ours).abs().max().item()
    if not pixels <= TOLERANCE:
        raise ValueError(f"the image processors differ by {pixels:.2g} in pixel values, more than {TOLERANCE:g}.")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, *source.image_size, generator=generator)
    difference = largest = 0.0
    for batch in (noise, pixel_values):
        expected, logits = source.logits(batch), model(batch, pooling="gap").logits
        largest = max(largest, expected.abs().max().item())
        difference = max(difference, (expected - logits).abs().max().item())
        if not (expected - logits).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item()):
            where = first_difference(source, model, renamed, batch)
            raise ValueError(f"the converted model's logits differ from the source's by {difference:.2g}: {where}.")
    return Parity(difference, largest, pixels)


def _record(outputs: dict[str, torch.Tensor], name: str, module: nn.Module, args: tuple, output) -> None:
    if isinstance(output, torch.Tensor):
        outputs[name] = output.flatten().sort().values  # whatever the order of the axes


def _layer_outputs(model: nn.Module, names: set[str], pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sorted outputs of the named submodules, in the order in which they run."""
    outputs = {}
    hooks = [model.get_submodule(name).register_forward_hook(partial(_record, outputs, name)) for name in names]
    try:
        model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def first_difference(
    source: Source, model: nn.Module, renamed: dict[str, list[str]], pixel_values: torch.Tensor
) -> str:
    """Say which layer with weights is the first whose output differs between a source and its conversion."""
    pairs = {name.rpartition(".")[0]: targets[0].rpartition(".")[0] for name, targets in renamed.items()}
    theirs = _layer_outputs(source.model, set(pairs), pixel_values)
    ours = _layer_outputs(model, set(pairs.values()), pixel_values)
    for name, expected in theirs.items():
        output = ours.get(pairs[name])
        if output is None:
            return f"first in layer {name}, which the converted model does not run"
        if output.shape != expected.shape:
            return f"first in layer {name}, whose output has another shape in {pairs[name]}"
        difference = (output - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            return f"first in layer {name}, by {difference:.2g} from {pairs[name]}"
    return "no layer with weights differs, so the pooling does"
