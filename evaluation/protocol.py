"""The two protocols: which images the curves run between, and how equally salient pixels are ordered.

`"reference"` is the paper's, to the digit. `"stable"` changes three things about insertion and deletion, each measured
in evaluation/README.md and each to be had alone, by its name:

- `"hiding_blur"`: insertion starts from a blur that hides the object (a Gaussian whose sigma is 1/16 of the image's
  longer side, with mirrored borders) instead of a 5x5 one that leaves most classes recognisable and darkens the
  borders;
- `"blurred_deletion"`: deletion ends there too, instead of at the mean colour, whose hard edges are objects of their
  own;
- `"random_ties"`: pixels of equal saliency are taken in one fixed random order instead of by index, which removes the
  flat part of a map from its lower right corner upwards.
"""

from collections.abc import Iterator

import torch

from .perturbation import blur_images, num_steps, pixel_order, pixels_per_step, transition_images

STABLE_BLUR_SHARE = 16
TIE_SEED = 0


def insertion_start(pixel_values: torch.Tensor, protocol: str) -> torch.Tensor:
    """Images from which insertion starts, (batch_size, num_channels, height, width), normalised."""
    return _hiding_blur(pixel_values) if changes(protocol, "hiding_blur") else blur_images(pixel_values)


def deletion_end(pixel_values: torch.Tensor, start: torch.Tensor, protocol: str) -> torch.Tensor:
    """Images at which deletion ends; `start` is what `insertion_start` returned."""
    if not changes(protocol, "blurred_deletion"):
        return torch.zeros_like(pixel_values)
    return start if changes(protocol, "hiding_blur") else _hiding_blur(pixel_values)


def changes(protocol: str, change: str) -> bool:
    """Whether a protocol makes one of stable's changes."""
    return protocol in ("stable", change)


def _hiding_blur(pixel_values: torch.Tensor) -> torch.Tensor:
    side = max(pixel_values.shape[2:])
    reach = min(max(1, side // 8), min(pixel_values.shape[2:]) - 1)  # two sigmas; mirroring needs less than the image
    return blur_images(pixel_values, kernel_size=2 * reach + 1, sigma=side / STABLE_BLUR_SHARE, padding="reflect")


def saliency_order(saliency: torch.Tensor, protocol: str) -> torch.Tensor:
    """Pixel indices (batch_size, height * width), the most salient first, ties broken as the protocol says."""
    if not changes(protocol, "random_ties"):
        return pixel_order(saliency)
    generator = torch.Generator().manual_seed(TIE_SEED)
    shuffled = torch.randperm(saliency[0].numel(), generator=generator).to(saliency.device)
    return shuffled[pixel_order(saliency.flatten(1)[:, shuffled].view_as(saliency))]


def inner_points(
    start: torch.Tensor, end: torch.Tensor, order: torch.Tensor, points_per_chunk: int
) -> Iterator[torch.Tensor]:
    """The images of a curve between its two ends, which are left out: they are the same for every map.

    Yields: (points, batch_size, num_channels, height, width).
    """
    height, width = start.shape[2:]
    step = pixels_per_step(height, width)
    counts = [step * point for point in range(1, num_steps(height, width))]
    return transition_images(start, end, order, counts, points_per_chunk)
