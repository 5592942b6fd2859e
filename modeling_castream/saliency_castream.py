"""Saliency maps of a CA-Stream classifier: `explain`, and `explain_features` for many maps of the same images.

All methods read one forward pass. A map is combined at the resolution of its target layer, passed through ReLU where
its paper does, min-max scaled per image, and upsampled bilinearly to the image.
"""

import operator
import warnings
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .cam_castream import normalize_maps
from .configuration_castream import resolve_pooling
from .features_castream import Features, evaluating, extract
from .methods_castream import METHODS

Target = int | str | Sequence[int | str] | torch.Tensor | None


def explain(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    target: Target = None,
    method: str = "grad_cam",
    pooling: str | None = None,
    *,
    layer: int | str = -1,
    upsample: bool = True,
    normalize: bool = True,
    **options,
) -> torch.Tensor:
    """Saliency maps of a batch of images. The model is left exactly as it was.

    Args:
        model: a CAStreamForImageClassification, in any mode, frozen or not, compiled or not.
        pixel_values: (batch_size, num_channels, height, width), normalised; moved to the model's device and dtype.
        target, method, pooling: as in `explain_features`, but one pooling.
        layer: as there, or `"all"` for each of `config.stream_layers`, stacked on the second axis.
        upsample: whether maps get the images' size, or keep that of the layer.
        normalize: whether maps are min-max scaled to [0, 1]. With `normalize=False, relu=False` they are signed, raw.
        options: of `explain_features`: relu, image_mean, image_std, chunk_size, autocast_dtype.

    Returns:
        (batch_size, height, width), float32, in [0, 1], on the model's device. A map that is flat or has no positive
        value is all zero, and so is one that is not finite, as of an image with NaN pixels; `empty_maps` finds them,
        and one warning counts them.

    Raises:
        ValueError: on an unknown method, pooling, layer or target, naming it.

    Example:

    ```python
    >>> maps = explain(model, processor(image, return_tensors="pt").pixel_values, target="tabby, tabby cat")
    ```
    """
    features, every_layer = extract(model, pixel_values), layer == "all"
    if every_layer and not upsample:
        raise ValueError("layer='all' needs upsample=True: the layers' maps have different sizes.")
    layers = range(len(model.config.stream_layers)) if every_layer else [layer]
    options = options | {"normalize": normalize}
    maps = [explain_features(features, target, method, pooling, layer=one, **options) for one in layers]
    empty = [empty_maps(one) for one in maps]  # before upsampling: the same answer from a thousandth of the pixels
    if normalize and (count := sum(int(one.sum()) for one in empty)):
        total = sum(one.numel() for one in empty)
        warnings.warn(f"{count} of {total} {method} maps are flat or not finite: zero.", stacklevel=2)
    maps = [upsample_maps(one, pixel_values.shape[-2:]) for one in maps] if upsample else maps
    return torch.stack(maps, dim=1) if every_layer else maps[0]


def explain_features(
    features: Features,
    target: Target = None,
    method: str = "grad_cam",
    pooling: str | Sequence[str] | None = None,
    *,
    layer: int | str = -1,
    relu: bool | None = None,
    normalize: bool = True,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    chunk_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Saliency maps at the target layer's resolution, from features that methods and poolings share.

    Args:
        features: what `extract(model, pixel_values)` returned.
        target: the class to explain: an id or a label for all images, a sequence or LongTensor of one per image, a
            LongTensor (batch_size, num_targets) for several maps of each image, or None for the class predicted under
            `pooling`.
        method: one of `METHODS`. `"raw_attention"` is the same for every class, unless queries are class-specific.
            `"evidence"` shows what the prediction rests on, and with a target what speaks for that class; `"object"`
            shows where something is, whatever it is. Both need a model with that evidence block. `"cls_attention"`, the
            CLS token's in the last block, needs a classifier that reads that token.
        pooling: `"ca"`, `"source"` (`"gap"`, where that is an average), None for `config.pooling`, or several:
            Score-CAM then passes its masked images through the backbone once for all.
        layer: the target layer, an index into `config.stream_layers` or one of its names; -1, the pooled feature map.
            At other layers than the pooled one, methods that need gradients pay a forward and a backward pass through
            the backbone, and `"attention_cam"` and `"ablation_cam"` do not exist. Where the source reads a CLS token,
            gradients for the pooled feature map are taken where its last block reads the patch tokens; and a source
            that averages nothing has no `"attention_cam"` and `"ablation_cam"` under `"source"`. Where it pools by
            attention, that is `"raw_attention"` under `"source"`.
        relu: whether negative values are cut off; None, as the method's paper does.
        normalize: whether maps are min-max scaled to [0, 1].
        image_mean, image_std: for `"score_cam"`, those of the image processor: channels then mask the image in [0, 1],
            as in the paper. None: they mask `pixel_values`, so that what is masked fades to the mean colour, not black.
        chunk_size: for `"score_cam"` and `"ablation_cam"`, the masked images or maps to run at a time;
            None: what suits the device.
        autocast_dtype: for `"score_cam"`, the dtype of the backbone's passes over masked images, e.g. torch.bfloat16.

    Returns:
        (batch_size, height_l, width_l), or (batch_size, num_targets, height_l, width_l) for a `target` of that shape,
        float32; for several poolings a dictionary of these.

    Raises:
        ValueError: on an unknown method, pooling, layer or target, naming it.
    """
    model = features.model
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    chosen = METHODS[method]
    single = pooling is None or isinstance(pooling, str)
    poolings = {one: resolve_pooling(model.config, one) for one in ([pooling] if single else pooling)}
    index = resolve_layer(model.config, layer)
    if chosen.pooled_layer_only and index != len(features.feature_maps) - 1:
        raise ValueError(f"method {method!r} explains the pooled feature map only: use layer=-1, got {layer!r}.")
    if chosen.needs_positions and "source" in poolings.values():
        raise ValueError(
            f"method {method!r} needs a pooling over positions, and pooling='source' of this model is its "
            f"{model.config.source_readout} readout: use pooling='ca', or another method."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    with evaluating(model):
        targets = _targets(features, target, chosen.needs_target, poolings)
        if chosen.masked_passes:
            masking = {"image_mean": image_mean, "image_std": image_std, "autocast_dtype": autocast_dtype}
            maps = chosen.equation(features, targets, index, chunk_size=chunk_size, **masking)
        else:
            maps = {
                one: chosen.signed_maps(features, targets[one], name, index, chunk_size)
                for one, name in poolings.items()
            }
    relu = chosen.relu if relu is None else relu
    maps = {name: _finish(one, relu, normalize) for name, one in maps.items()}
    return maps[pooling] if single else maps


def _targets(
    features: Features, target: Target, needed: bool, poolings: Sequence[str]
) -> dict[str, torch.Tensor | None]:
    """The classes to explain under each pooling; of none, the predicted ones, where a method needs any.

    The logits, and the stream before them, are computed only where a method reads them.
    """
    if target is not None:
        ids = resolve_target(features.model.config, target, len(features.pixel_values))
        return dict.fromkeys(poolings, ids.to(features.pixel_values.device))
    return {name: features.logits(name).argmax(-1) if needed else None for name in poolings}


def upsample_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, corners not aligned, not rescaled: (batch_size, ..., height_l, width_l) -> (batch_size, ..., *size)."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    upsampled = F.interpolate(flat, tuple(size), mode="bilinear", align_corners=False)
    # Rounding alone leaves a map's own extremes by an ulp.
    upsampled = upsampled.clamp(flat.amin((2, 3), keepdim=True), flat.amax((2, 3), keepdim=True))
    return upsampled.reshape(*maps.shape[:-2], *size)


def empty_maps(maps: torch.Tensor) -> torch.Tensor:
    """Which maps are all zero: flat, without positive value, or not finite before they were set to zero."""
    return maps.flatten(-2).count_nonzero(-1) == 0


def resolve_layer(config, layer: int | str) -> int:
    """Index of a target layer in `config.stream_layers`.

    Raises:
        ValueError: on a layer that is not there.
    """
    names = config.stream_layers
    if layer in names:
        return names.index(layer)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return layer % len(names)
    raise ValueError(f"layer must be one of {', '.join(names)} or an index into these, got {layer!r}.")


def resolve_target(config, target: Target, batch_size: int) -> torch.Tensor:
    """Class ids, one (or several) per item.

    Args:
        target: as in `explain`, but not None.
        batch_size: number of items.

    Returns:
        LongTensor (batch_size,) or (batch_size, num_targets), on the device of `target`.

    Raises:
        ValueError: on a class that is not there, or a number of targets other than the number of items.
    """
    if not isinstance(target, torch.Tensor):
        several = not isinstance(target, str) and hasattr(target, "__len__")
        ids = [_class_id(config, entry) for entry in (target if several else [target])]
        target = torch.tensor(ids if several else ids * batch_size)
    if target.is_floating_point() or target.dtype == torch.bool or target.ndim > 2:
        raise ValueError(f"target must hold class ids, got {target.dtype} of shape {tuple(target.shape)}.")
    target = target.long()
    target = target.expand(batch_size) if target.ndim == 0 else target
    if len(target) != batch_size:
        raise ValueError(f"target must hold one class per image, got {len(target)} for {batch_size} images.")
    wrong = [entry for entry in target.flatten().tolist() if not 0 <= entry < config.num_labels]
    if wrong:
        raise ValueError(f"target must hold class ids from 0 to {config.num_labels - 1}, got {wrong}.")
    return target


def _class_id(config, entry: int | str) -> int:
    if isinstance(entry, str):
        if entry not in config.label2id:
            some = ", ".join(map(repr, list(config.label2id)[:3]))
            raise ValueError(f"target must be a class id or a label of the model ({some}, ...), got {entry!r}.")
        return int(config.label2id[entry])
    try:
        return operator.index(entry)
    except TypeError:
        raise ValueError(f"target must be a class id or a label of the model, got {entry!r}.") from None


def _finish(maps: torch.Tensor, relu: bool, normalize: bool) -> torch.Tensor:
    """ReLU and scaling; an item with a non-finite map gets a zero map, and the others do not feel it."""
    finite = maps.isfinite().flatten(1).all(1)
    maps = torch.where(finite.view(-1, *[1] * (maps.ndim - 1)), maps, 0)
    maps = maps.relu() if relu else maps
    return normalize_maps(maps) if normalize else maps


__all__ = ["METHODS", "Features", "empty_maps", "explain", "explain_features", "extract", "upsample_maps"]
