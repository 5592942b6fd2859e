"""Channel weights found by trying: Score-CAM masks the image by each channel, Ablation-CAM leaves each channel out."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .cam_castream import EPS
from .features_castream import Features, pool_and_classify, run_backbone


def default_chunk_size(pixel_values: torch.Tensor) -> int:
    """As many images as have the pixels of 8 of 224 x 224 on a CPU, of 128 elsewhere.

    A CPU's caches hold no more: ResNet-50 takes 0.107 s an image in chunks of 8, 0.150 s in chunks of 32.
    """
    images = 8 if pixel_values.device.type == "cpu" else 128
    return max(1, images * 224 * 224 // pixel_values[0, 0].numel())


def _chunks(items: torch.Tensor, channels: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of item and channel to try, `size` at a time; nothing where there is none, which split would yield."""
    for start in range(0, len(items), size):
        yield items[start : start + size], channels[start : start + size]


def score_cam_weights(
    features: Features,
    targets: dict[str, torch.Tensor],
    layer: int,
    *,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    chunk_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """w_k = probability of the class for the image masked by channel k.

    The masks do not depend on the pooling: one pass through the backbone serves all poolings and targets. A channel
    that is constant over the image has the mask 0; all such channels share one black image.

    Differs from paper: no baseline's score is subtracted and the weights do not go through a softmax over channels, as
    in the authors' code of CA-Stream. Source: Score-CAM, arXiv:1910.01279v2, Algorithm 1.

    Args:
        features: what `extract` returned.
        targets: class ids per pooling, each (batch_size,) or (batch_size, num_targets).
        layer: index of the layer whose channels are the masks.
        image_mean, image_std: the image processor's, so that the mask multiplies the image in [0, 1]; None: it
            multiplies `pixel_values` as they are, so that what is masked fades to the mean colour, not black.
        chunk_size: masked images in one pass through the backbone; None as for `default_chunk_size`.
        autocast_dtype: e.g. torch.bfloat16 for the backbone; None: as for `features`.

    Returns:
        The weights per pooling, (batch_size, num_channels) or (batch_size, num_targets, num_channels), float32, from 0
        to 1.
    """
    pixel_values, feature_map = features.pixel_values, features.feature_maps[layer].float()
    shift = _black(image_mean, image_std, pixel_values)
    from_black = pixel_values + shift
    flat = feature_map.flatten(2)
    constant = flat.amax(2) == flat.amin(2)
    items, channels = (~constant).nonzero(as_tuple=True)
    wanted = {name: target.reshape(len(constant), -1) for name, target in targets.items()}
    weights = {name: feature_map.new_empty(*constant.shape, one.shape[1]) for name, one in wanted.items()}
    if constant.any():
        probabilities = _probabilities(features, (-shift).expand_as(pixel_values[:1]), wanted, autocast_dtype)
        for name, one in wanted.items():
            weights[name][constant] = probabilities[name][0][one[constant.nonzero()[:, 0]]]
    for item, channel in _chunks(items, channels, chunk_size or default_chunk_size(pixel_values)):
        masks = _masks(feature_map[item, channel], pixel_values.shape[-2:])
        masked = torch.addcmul(-shift, from_black[item], masks.to(pixel_values.dtype))
        probabilities = _probabilities(features, masked, wanted, autocast_dtype)
        for name, one in wanted.items():
            weights[name][item, channel] = probabilities[name].gather(1, one[item])
    return {name: one.movedim(1, 2) if targets[name].ndim == 2 else one.squeeze(2) for name, one in weights.items()}


def _black(image_mean: list[float] | None, image_std: list[float] | None, pixel_values: torch.Tensor) -> torch.Tensor:
    """mean / std, (1, num_channels, 1, 1): what to add to a normalised image so that black is 0."""
    if (image_mean is None) != (image_std is None):
        raise ValueError("image_mean and image_std are needed both, or neither.")
    if image_mean is None:
        return pixel_values.new_zeros(1, 1, 1, 1)
    mean, std = (torch.as_tensor(value, dtype=torch.float64).view(1, -1, 1, 1) for value in (image_mean, image_std))
    return (mean / std).to(pixel_values)


def _masks(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (n, height_l, width_l) -> masks (n, 1, height, width) in [0, 1]: upsampled, then min-max scaled."""
    masks = F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return (masks - low) / (high - low + EPS)


def _probabilities(
    features: Features, images: torch.Tensor, poolings: dict, autocast_dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Probabilities (n, num_labels) under each pooling, of one pass through the backbone."""
    maps, cls_token = run_backbone(features.model, images, autocast_dtype or features.autocast_dtype)
    logits = {name: pool_and_classify(features.model, maps, cls_token, name).logits for name in poolings}
    return {name: features.model.probabilities(one) for name, one in logits.items()}


def ablation_cam_weights(
    features: Features, target: torch.Tensor, pooling: str, *, chunk_size: int | None = None
) -> torch.Tensor:
    """w_k = (y - y_k) / |y|, y the target's logit and y_k the one without channel k of the pooled feature map.

    The stream's last query comes from shallower maps and stays; its attention to the last map is taken anew.

    Differs from paper: |y|, not y, as a negative logit would turn the map upside down.
    Source: Ablation-CAM, doi:10.1109/WACV45572.2020.9093360.

    Args:
        target: (batch_size,).
        chunk_size: ablated maps pooled at a time; None as for `default_chunk_size`.

    Returns:
        (batch_size, num_channels), float32.
    """
    feature_map, logits = features.feature_maps[-1], features.logits(pooling)
    query = _last_query(features, target) if pooling == "ca" else None
    scores = logits.gather(1, target[:, None]).float().expand(feature_map.shape[:2]).clone()
    items, channels = feature_map.flatten(2).count_nonzero(2).nonzero(as_tuple=True)
    for item, channel in _chunks(items, channels, chunk_size or default_chunk_size(features.pixel_values)):
        ablated = feature_map[item]
        ablated[torch.arange(len(item), device=item.device), channel] = 0
        one_query = None if query is None else query[item]
        cls_token = None if features.cls_token is None else features.cls_token[item]
        without = _classify_with_query(features.model, one_query, ablated, cls_token)
        scores[item, channel] = without.gather(1, target[item, None]).squeeze(1).float()
    full = logits.gather(1, target[:, None]).float()
    return (full - scores) / full.abs().clamp_min(torch.finfo(torch.float32).tiny)


def _last_query(features: Features, target: torch.Tensor) -> torch.Tensor:
    """q_L, (batch_size, 1, num_channels): of class-specific queries the target's."""
    stream = features.model.castream.stream
    query = stream.query.expand(len(target), -1, -1)
    if features.model.config.query == "class_specific":
        query = query[torch.arange(len(target), device=target.device), target][:, None]
    for block, feature_map in zip(stream.blocks[:-1], features.feature_maps[:-1], strict=True):
        query, _ = block(query, feature_map)
    return query


def _classify_with_query(
    model: torch.nn.Module, query: torch.Tensor | None, feature_map: torch.Tensor, cls_token: torch.Tensor | None
) -> torch.Tensor:
    """Logits (n, num_labels) of pooled maps: attended by `query`, or averaged where that is None."""
    if query is None:
        return model.classify(feature_map.mean((2, 3)), cls_token)
    pooled, _ = model.castream.stream.blocks[-1](query, feature_map)
    if model.config.query == "class_specific":  # every class reads its own token, and this is the target's
        return model.classify(pooled.expand(-1, model.config.num_labels, -1), cls_token)
    return model.classify(pooled.squeeze(1), cls_token)


__all__ = ["ablation_cam_weights", "score_cam_weights"]
