"""Masked views of an image: what is hidden, and what is shown in its place.

A sample's masks follow from its own seed and from nothing else, so that they do not depend on who draws them or when.

    soft        smooth noise
    salient     the saliency map that is given
    complement  its opposite
    blob        a random region with sharp edges, of a tenth to 85 % of the image
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

KINDS = ("soft", "salient", "complement", "blob")
BACKGROUNDS = ("black", "grey", "blur")
GRID = 4  # cells of the noise that soft masks and blobs are made of
_LEAST_HIDDEN, _MOST_HIDDEN = 0.15, 0.9  # share of the image that a blob leaves out
_RANKED = 4  # every fourth pixel of every fourth row ranks the smooth noise well enough, and sorting takes its time
_BLUR = 16  # the blurred background is the image at a sixteenth of its size


def scale_to_unit(maps: torch.Tensor) -> torch.Tensor:
    """Maps (..., height, width) min-max scaled to [0, 1]; flat ones become zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def draw_masks(
    seeds: torch.Tensor, saliency: torch.Tensor, kinds: Sequence[str], size: tuple[int, int]
) -> torch.Tensor:
    """Draw masks for a batch of images.

    Args:
        seeds: (batch_size,), of the samples.
        saliency: (batch_size, rows, columns) in [0, 1], for the kinds that follow it.
        kinds: one per mask, out of KINDS.
        size: height and width of the masks.

    Returns:
        (batch_size, len(kinds), height, width), float32 in [0, 1]; 1 is shown.
    """
    draws = [_draw(int(seed), len(kinds)) for seed in seeds]
    noise = torch.stack([grid for grid, _ in draws]).to(saliency.device)
    hidden = torch.stack([share for _, share in draws]).to(saliency.device)
    salient = F.interpolate(saliency[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    masks = []
    for number, kind in enumerate(kinds):
        if kind in ("salient", "complement"):
            masks.append(salient if kind == "salient" else 1 - salient)
        elif kind == "soft":
            soft = scale_to_unit(_enlarge(noise[:, number], saliency.shape[1:]).relu())
            masks.append(F.interpolate(soft[:, None], size, mode="bilinear", align_corners=False)[:, 0])
        else:
            smooth = _enlarge(noise[:, number], size)
            coarse = smooth[:, ::_RANKED, ::_RANKED] if min(size) > GRID * _RANKED else smooth
            ranked = coarse.flatten(1).sort(1).values
            place = (hidden[:, number : number + 1] * (ranked.shape[1] - 1)).long()
            masks.append((smooth > ranked.gather(1, place)[:, :, None]).float())
    return torch.stack(masks, dim=1)


def _enlarge(noise: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch_size, GRID, GRID) -> (batch_size, *size), bicubic, as two matrix products, which take a CPU less time."""
    unit = torch.eye(GRID, dtype=noise.dtype, device=noise.device)[:, None, :, None]
    rows, columns = (F.interpolate(unit, (side, 1), mode="bicubic")[:, 0, :, 0] for side in size)
    return rows.T @ noise @ columns


def draw_backgrounds(seeds: torch.Tensor, num_masks: int, backgrounds: Sequence[str]) -> torch.Tensor:
    """Which of `backgrounds` shows where each mask hides: indices (batch_size, num_masks), each as likely."""
    generators = [torch.Generator().manual_seed(int(seed) + 1) for seed in seeds]
    return torch.stack([torch.randint(len(backgrounds), (num_masks,), generator=one) for one in generators])


def make_backgrounds(
    pixel_values: torch.Tensor, backgrounds: Sequence[str], mean: torch.Tensor, std: torch.Tensor
) -> list[torch.Tensor]:
    """What can show in an image's place, normalised like it.

    Args:
        pixel_values: (batch_size, num_channels, height, width), normalised.
        mean, std: of the normalisation, (num_channels, 1, 1).

    Returns:
        One tensor for each of `backgrounds`, channels last: of the shape of `pixel_values`, or of one image for all.
    """
    made = []
    for name in backgrounds:
        if name == "blur":
            size = [max(1, side // _BLUR) for side in pixel_values.shape[2:]]
            small = F.adaptive_avg_pool2d(pixel_values.float(), size).to(pixel_values.dtype)
            blurred = F.interpolate(small, pixel_values.shape[2:], mode="bilinear", align_corners=False)
            made.append(blurred.to(pixel_values.dtype))  # autocast on a GPU interpolates in float32
        else:
            value = {"black": 0.0, "grey": 0.5}[name]
            made.append(((value - mean) / std).to(pixel_values.dtype).expand_as(pixel_values[:1]))
    return [background.contiguous(memory_format=torch.channels_last) for background in made]


def show_masked(
    pixel_values: torch.Tensor, masks: torch.Tensor, backgrounds: list[torch.Tensor], chosen: torch.Tensor
) -> torch.Tensor:
    """Images where their masks show them, and a background where these hide them.

    A CPU goes image by image, over rows of pixels with their channels side by side: what lies between then stays in its
    cache, and no loop is as short as the channels are few. A GPU takes all images at once.

    Args:
        pixel_values: (batch_size, num_channels, height, width), fastest with channels last.
        masks: (batch_size, height, width) in [0, 1]; 1 is shown.
        backgrounds: as `make_backgrounds` returns them; chosen: which of them each image has, (batch_size,).

    Returns:
        Of the shape of `pixel_values`, channels last.
    """
    if pixel_values.device.type != "cpu":
        kinds = torch.stack([one.expand_as(pixel_values) for one in backgrounds])
        hidden = kinds[chosen.to(pixel_values.device), torch.arange(len(chosen))]
        shown = torch.lerp(hidden, pixel_values, masks[:, None].to(pixel_values.dtype))
        return shown.contiguous(memory_format=torch.channels_last)
    shown, num_channels = torch.empty_like(pixel_values, memory_format=torch.channels_last), pixel_values.shape[1]
    for item, kind in enumerate(chosen.tolist()):
        image, hidden, result = (
            one[item if len(one) > 1 else 0].permute(1, 2, 0).flatten(1)
            for one in (pixel_values, backgrounds[kind], shown)
        )
        weight = masks[item].to(image.dtype).repeat_interleave(num_channels, dim=-1)
        torch.lerp(hidden, image, weight, out=result)
    return shown


def _draw(seed: int, num_masks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal noise (num_masks, GRID, GRID), and the share that each mask would hide as a blob, (num_masks,)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_masks, GRID, GRID, generator=generator)
    return noise, _LEAST_HIDDEN + (_MOST_HIDDEN - _LEAST_HIDDEN) * torch.rand(num_masks, generator=generator)
