"""Every saliency method once: its title, its equation, and what it needs. All that names methods reads `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cam_castream import (
    attention_terms,
    combine,
    cosine_cam,
    eigen_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    xgrad_cam,
)
from .features_castream import (
    Features,
    inner_map_gradients,
    logit_direction,
    pooled_direction,
    pooled_map_gradients,
    source_attention,
)
from .masking_castream import ablation_cam_weights, score_cam_weights


@dataclass(frozen=True)
class Method:
    """A saliency method.

    Args:
        title: its name in figures.
        equation: signed maps (batch_size, height_l, width_l) before ReLU and scaling, a function of what
            `signed_maps` takes. With `gradients`, of the target layer's map and the logit's gradient there instead;
            with `masked_passes`, of the features, the targets by pooling and the layer, for all poolings at once.
        gradients: `"mean"` if the gradient's mean over positions is enough (at the pooled layer it has a closed form),
            `"full"`, or None for a method without gradients.
        masked_passes: whether the backbone sees the image once per channel.
        relu: whether the method's paper cuts off negative values.
        pooled_layer_only: whether it is defined at the last layer only.
        class_agnostic: whether the map is the same for every class.
        needs_target: whether it explains a class, the predicted one where none is given; else a missing target is
            the method's own affair.
        needs_positions: whether it follows the logit into the positions that were pooled, which a source that reads
            a CLS token or an attention pooling has none of.
    """

    title: str
    equation: Callable
    gradients: str | None = None
    masked_passes: bool = False
    relu: bool = True
    pooled_layer_only: bool = False
    class_agnostic: bool = False
    needs_target: bool = True
    needs_positions: bool = False

    def signed_maps(
        self, features: Features, target: torch.Tensor | None, pooling: str, layer: int, chunk_size: int | None
    ) -> torch.Tensor:
        """Maps before ReLU and scaling: (batch_size, [num_targets,] height_l, width_l), float32.

        Args:
            target: (batch_size,) or (batch_size, num_targets).
            chunk_size: masked maps to run at a time, for a method that masks.
        """
        if target is not None and target.ndim == 2:
            distinct = target[:, :1] if self.class_agnostic else target
            maps = [self.signed_maps(features, one, pooling, layer, chunk_size) for one in distinct.unbind(1)]
            return torch.stack(maps, dim=1).expand(-1, target.shape[1], -1, -1)
        if self.gradients is None:
            return self.equation(features, target, pooling, layer, chunk_size)
        feature_map = features.feature_maps[layer].float()
        if layer != len(features.feature_maps) - 1 or features.model.config.source_pooling != "gap":
            feature_map, gradients = inner_map_gradients(features, target, pooling, layer)
        elif self.gradients == "full":
            gradients = pooled_map_gradients(features, target, pooling)
        else:
            gradients = pooled_direction(features, target, pooling)[:, :, None, None] / feature_map[0, 0].numel()
        return self.equation(feature_map, gradients)


def _attention(features: Features, target: torch.Tensor, layer: int) -> torch.Tensor:
    """A block's attention (batch_size, num_heads, height_l, width_l), float32; the target's if class-specific."""
    attention = features.pool("ca").attention_maps[layer].float()  # the same under either pooling
    if features.model.config.query == "class_specific":
        return attention[torch.arange(len(target), device=target.device), target][:, None]
    return attention


def _raw_attention(features: Features, target: torch.Tensor, pooling: str, layer: int, chunk_size) -> torch.Tensor:
    pooled = layer == len(features.feature_maps) - 1
    if pooled and pooling == "source" and features.model.config.source_readout == "attention":
        return _source_attention("raw_attention", features)
    return _attention(features, target, layer).mean(1)


def _cls_attention(features: Features, target, pooling, layer, chunk_size) -> torch.Tensor:
    config = features.model.config
    if config.source_readout != "token" and not config.classifier_cls_token:
        raise ValueError("method 'cls_attention' needs a classifier that reads a CLS token: choose another method.")
    return _source_attention("cls_attention", features)


def _source_attention(method: str, features: Features) -> torch.Tensor:
    attention = source_attention(features)
    if attention is None:
        raise ValueError(f"method {method!r} needs attention to every patch, which this network's last block has not.")
    return attention.mean(1)


def _attention_cam(features: Features, target: torch.Tensor, pooling: str, layer: int, chunk_size) -> torch.Tensor:
    attention = _attention(features, target, layer) if pooling == "ca" else None
    return attention_terms(logit_direction(features, target, pooling), features.feature_maps[layer].float(), attention)


def _ablation_cam(
    features: Features, target: torch.Tensor, pooling: str, layer: int, chunk_size: int | None
) -> torch.Tensor:
    weights = ablation_cam_weights(features, target, pooling, chunk_size=chunk_size)
    return combine(weights, features.feature_maps[layer].float())


def _eigen_cam(features: Features, target, pooling, layer: int, chunk_size) -> torch.Tensor:
    return eigen_cam(features.feature_maps[layer].float())


def _score_cam(features: Features, targets: dict[str, torch.Tensor], layer: int, **options) -> dict[str, torch.Tensor]:
    weights = score_cam_weights(features, targets, layer, **options)
    return {pooling: combine(one, features.feature_maps[layer].float()) for pooling, one in weights.items()}


def _evidence(features: Features, target: torch.Tensor | None, pooling, layer, chunk_size) -> torch.Tensor:
    return _evidence_map("evidence", "memory", features, target)


def _object(features: Features, target: torch.Tensor | None, pooling, layer, chunk_size) -> torch.Tensor:
    return _evidence_map("object", "constant", features, target)


def _evidence_map(method: str, query: str, features: Features, target: torch.Tensor | None) -> torch.Tensor:
    """An evidence block's map, summing to 1 over positions.

    Raises:
        ValueError: where the model has no such block.
    """
    model = features.model
    if query not in (model.config.evidence_queries or ()):
        raise ValueError(
            f"method {method!r} needs a model with an evidence block (evidence_queries={query!r}): train one with "
            "objective=mass_fidelity, or choose another method."
        )
    scores = model.evidence_scores(query, features.evidence_features, features.cls_token, target)
    return scores.flatten(1).softmax(-1).view_as(scores).float()


# what evidence blocks and the CLS token's attention share
_UNPOOLED = {"relu": False, "pooled_layer_only": True, "needs_target": False}
METHODS: dict[str, Method] = {
    "raw_attention": Method("Raw attention", _raw_attention, relu=False),
    "attention_cam": Method("Attention-CAM", _attention_cam, pooled_layer_only=True, needs_positions=True),
    "grad_cam": Method("Grad-CAM", grad_cam, gradients="mean"),
    "cosine_cam": Method("Cosine-CAM", cosine_cam, gradients="mean"),
    "grad_cam_plus_plus": Method("Grad-CAM++", grad_cam_plus_plus, gradients="full"),
    "hires_cam": Method("HiResCAM", hires_cam, gradients="full"),
    "layer_cam": Method("LayerCAM", layer_cam, gradients="full"),
    "xgrad_cam": Method("XGrad-CAM", xgrad_cam, gradients="full"),
    "score_cam": Method("Score-CAM", _score_cam, masked_passes=True),
    "ablation_cam": Method("Ablation-CAM", _ablation_cam, pooled_layer_only=True, needs_positions=True),
    "cls_attention": Method("CLS attention", _cls_attention, class_agnostic=True, **_UNPOOLED),
    "eigen_cam": Method("Eigen-CAM", _eigen_cam, relu=False, class_agnostic=True),
    "evidence": Method("Evidence", _evidence, **_UNPOOLED),
    "object": Method("Object", _object, class_agnostic=True, **_UNPOOLED),
}

__all__ = ["METHODS", "Method"]
