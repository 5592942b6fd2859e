"""Images with a part of their pixels taken away: what the faithfulness metrics show to the network.

    x in [0, 1]    -> images            (batch_size, num_channels, height, width), pixel space
    (x - m) / s    -> pixel_values      the same in normalised space, the network's input
    S              -> saliency          (batch_size, height, width), in [0, 1], at the image's resolution
    pi             -> order             (batch_size, height * width), pixel indices, the most salient first

Average drop, gain and increase, and the perturbation scores, act in pixel space and normalise afterwards; insertion and
deletion act in normalised space, where zero is the mean colour. Both are the reference's choices (CA-Stream research
code, June 2024). Functions are pure, keep dtype and device, and treat every image of a batch on its own.

Insertion (Petsiuk et al., RISE, arXiv:1806.07421) adds the most salient pixels to a blurred image, deletion takes them
away. Protocol `"reference"` is the paper's, to the digit. `"stable"` changes three things about them, each measured in
evaluation/README.md and each to be had alone, by its name:

- `"hiding_blur"`: insertion starts from a blur that hides the object (a Gaussian whose sigma is 1/16 of the image's
  longer side, with mirrored borders) instead of a 5x5 one that leaves most classes recognisable and darkens the
  borders;
- `"blurred_deletion"`: deletion ends there too, instead of at the mean colour, whose hard edges are objects of their
  own;
- `"random_ties"`: pixels of equal saliency are taken in one fixed random order instead of by index, which removes the
  flat part of a map from its lower right corner upwards.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

# A step of insertion or deletion changes this many rows' worth of pixels: 8 x image size.
ROWS_PER_STEP = 8
BLUR_SIZE, BLUR_SIGMA = 5, 5.0
PERTURBATION_TENTHS = range(1, 10)
STABLE_BLUR_SHARE = 16
TIE_SEED = 0


def upsample_saliency(saliency: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (batch_size, h, w) at `size` = (height, width): bilinear, align_corners=False, not rescaled afterwards."""
    _check_saliency(saliency)
    if tuple(saliency.shape[1:]) == tuple(size):
        return saliency
    return F.interpolate(saliency[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def normalize_images(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixel space [0, 1] to the network's input, (images - mean) / std per channel."""
    _check_images(images)
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"mean and std have {len(mean)} and {len(std)} entries but images has {images.shape[1]} channels: "
            "give one value a channel"
        )
    mean, std = (torch.as_tensor(v, dtype=images.dtype, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images - mean) / std


def mask_images(
    images: torch.Tensor, saliency: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Network input of the masked images: normalise(images * saliency).

    Args:
        images: (batch_size, num_channels, height, width) in [0, 1].
        saliency: (batch_size, height, width) in [0, 1], at the images' resolution (see `upsample_saliency`).
        mean, std: the image processor's, one value a channel.

    Source: CA-Stream, arXiv:2404.14996, evaluation; used by average drop, gain and increase.
    """
    _check_images(images)
    _check_saliency(saliency, images)
    return normalize_images(images * saliency[:, None].to(images.dtype), mean, std)


def pixel_order(saliency: torch.Tensor) -> torch.Tensor:
    """Pixel indices (batch_size, height * width), int64, from the most to the least salient.

    Ties are ordered by index, the higher index first: an ascending stable sort, flipped. The reference flips an
    unstable sort, whose ties depend on the machine; on a flat map it too gives the last pixel first.
    """
    _check_saliency(saliency)
    return saliency.flatten(1).argsort(dim=1, stable=True).flip(1)


def pixels_per_step(height: int, width: int) -> int:
    """Pixels that one step of insertion or deletion changes: 8 x the image size, the longer side if not square."""
    return ROWS_PER_STEP * max(height, width)


def num_steps(height: int, width: int) -> int:
    """Steps until every pixel has changed; a curve has one point more. The last step may be a smaller one."""
    return math.ceil(height * width / pixels_per_step(height, width))


def blur_profile(kernel_size: int = BLUR_SIZE, sigma: float = BLUR_SIGMA) -> torch.Tensor:
    """One-dimensional blur weights (kernel_size,), float64, sum 1: a unit impulse, smoothed by a Gaussian with
    reflecting borders.

    The impulse stands in the middle of `kernel_size` cells, and what leaves them is mirrored back in (the border cell
    repeated). A sigma as large as the kernel leaves nearly a box: this is the reference's blur, a weak one.
    """
    if kernel_size < 1 or kernel_size % 2 == 0 or not sigma > 0:
        raise ValueError(f"kernel_size={kernel_size}, sigma={sigma}: give an odd positive size and a positive sigma")
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    cells = (kernel_size // 2 + offsets) % (2 * kernel_size)
    cells = torch.minimum(cells, 2 * kernel_size - 1 - cells)
    return torch.zeros(kernel_size, dtype=torch.float64).index_add_(0, cells, weights / weights.sum())


def blur_images(
    pixel_values: torch.Tensor, kernel_size: int = BLUR_SIZE, sigma: float = BLUR_SIGMA, padding: str = "zeros"
) -> torch.Tensor:
    """Blurred images (batch_size, num_channels, height, width), from which insertion starts.

    The defaults are the reference's: 5x5, sigma 5, on the normalised image with zero padding, so that borders fade to
    the mean colour. `padding="reflect"` mirrors the image instead. The kernel is the outer product of `blur_profile`
    with itself.
    """
    _check_images(pixel_values)
    if padding not in ("zeros", "reflect"):
        raise ValueError(f"padding={padding!r}: choose 'zeros' or 'reflect'")
    profile = blur_profile(kernel_size, sigma)
    down, across = (_blur_matrix(size, profile, padding).to(pixel_values) for size in pixel_values.shape[2:])
    # a caller's autocast is meant for the network, not for its input
    with torch.autocast(pixel_values.device.type, enabled=False):
        return down @ pixel_values @ across.T


def _blur_matrix(size: int, profile: torch.Tensor, padding: str) -> torch.Tensor:
    """(size, size), whose row i holds the weights of all pixels of a line in its blurred pixel i.

    Two products with it are several times as fast as convolutions of single channels, most so with a wide profile.
    """
    reach = len(profile) // 2
    impulses = torch.eye(size, dtype=profile.dtype)[:, None]
    padded = F.pad(impulses, (reach, reach), mode="constant" if padding == "zeros" else "reflect")
    return F.conv1d(padded, profile.view(1, 1, -1))[:, 0].T


def transition_images(
    start: torch.Tensor,
    end: torch.Tensor,
    order: torch.Tensor,
    counts: Sequence[int],
    points_per_chunk: int = 1,
) -> Iterator[torch.Tensor]:
    """Images on the way from `start` to `end`, whose pixels change in `order`; one image of a batch beside the other.

    Args:
        start, end: (batch_size, num_channels, height, width).
        order: (batch_size, height * width), a permutation of the pixels per image.
        counts: how many pixels have changed, one number a point of the curve.
        points_per_chunk: points made at once. Memory is that of `points_per_chunk` copies of `start`, whatever the
            number of points; raise it to fill the network's batch when there are few images.

    Yields:
        (points, batch_size, num_channels, height, width) with points <= points_per_chunk, in the order of `counts`.
    """
    _check_images(start)
    if start.shape != end.shape:
        raise ValueError(f"start has shape {tuple(start.shape)} but end {tuple(end.shape)}: they must be equal")
    if points_per_chunk < 1:
        raise ValueError(f"points_per_chunk={points_per_chunk}: give at least 1")
    return _generate_transition(start, end, _check_order(order, start), tuple(counts), points_per_chunk)


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

    Yields:
        (points, batch_size, num_channels, height, width).
    """
    height, width = start.shape[2:]
    step = pixels_per_step(height, width)
    counts = [step * point for point in range(1, num_steps(height, width))]
    return transition_images(start, end, order, counts, points_per_chunk)


def perturbation_counts(height: int, width: int) -> list[int]:
    """Pixels that the nine perturbation fractions 0.1, 0.2 .. 0.9 take away, rounded down, in exact integers."""
    return [height * width * tenths // 10 for tenths in PERTURBATION_TENTHS]


def perturbation_images(
    images: torch.Tensor,
    order: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    positive: bool = True,
    points_per_chunk: int = 1,
) -> Iterator[torch.Tensor]:
    """Network inputs with 10 % .. 90 % of the pixels black: the most salient ones (positive) or the least (negative).

    Args:
        images: (batch_size, num_channels, height, width) in [0, 1]; pixels become 0 here, before normalisation.
        order: from `pixel_order`; negative perturbation goes through it backwards.

    Yields:
        As `transition_images`, nine points in all.

    Source: Chefer et al., arXiv:2012.09838, as the CA-Stream reference computes it.
    """
    _check_images(images)
    start = normalize_images(images, mean, std)
    end = normalize_images(torch.zeros_like(images), mean, std)
    counts = perturbation_counts(*images.shape[2:])
    return transition_images(start, end, order if positive else order.flip(1), counts, points_per_chunk)


def _generate_transition(
    start: torch.Tensor, end: torch.Tensor, order: torch.Tensor, counts: tuple[int, ...], points_per_chunk: int
) -> Iterator[torch.Tensor]:
    """From point to point only the pixels that change are written; the images have channels last, as pixels do here."""
    batch_size, num_channels, height, width = start.shape
    start, end = (image.permute(0, 2, 3, 1).reshape(-1, num_channels) for image in (start, end))
    rows = order + height * width * torch.arange(batch_size, device=order.device)[:, None]
    current, changed = start.clone(), 0
    for first in range(0, len(counts), points_per_chunk):
        chunk = counts[first : first + points_per_chunk]
        images = current.new_empty(len(chunk), *current.shape)
        for image, count in zip(images, chunk, strict=True):
            pixels, source = (rows[:, changed:count], end) if count > changed else (rows[:, count:changed], start)
            current.index_copy_(0, pixels.reshape(-1), source.index_select(0, pixels.reshape(-1)))
            image.copy_(current)
            changed = count
        yield images.view(len(chunk), batch_size, height, width, num_channels).permute(0, 1, 4, 2, 3)


def _check_order(order: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """`order` on the images' device, if it is a permutation of every image's pixels."""
    batch_size, _, height, width = images.shape
    if order.shape != (batch_size, height * width):
        raise ValueError(
            f"order has shape {tuple(order.shape)} but {batch_size} images of {height}x{width} need "
            f"{(batch_size, height * width)}: use pixel_order on maps of the images' size"
        )
    order = order.to(device=images.device, dtype=torch.int64)
    found = torch.zeros_like(order, dtype=torch.bool)
    if ((order >= 0) & (order < height * width)).all():
        found.scatter_(1, order, True)
    if not found.all():  # an index that comes twice leaves another one out
        raise ValueError("order is not a permutation of the pixel indices of every image: use pixel_order")
    return order


def _check_images(images: torch.Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}: "
            "give a floating point (batch_size, num_channels, height, width)"
        )


def _check_saliency(saliency: torch.Tensor, images: torch.Tensor | None = None) -> None:
    if saliency.ndim != 3 or not saliency.is_floating_point():
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)} and dtype {saliency.dtype}: "
            "give a floating point (batch_size, height, width)"
        )
    if images is not None and saliency.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)} but images {tuple(images.shape)}: "
            "give one map an image, at its resolution (upsample_saliency)"
        )
    if not torch.isfinite(saliency).all():
        raise ValueError("saliency holds NaN or infinite values: replace them (a map without evidence is all zero)")
