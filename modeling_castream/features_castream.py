"""What all explanations of a batch share: one forward pass, and the ways to differentiate a logit at a feature map.

Nothing here touches the model: no hook, no `requires_grad`, no mode that is not put back. Whatever computes does so
within `evaluating(model)`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .configuration_castream import resolve_pooling

# The model that `evaluating` holds in eval mode, in this thread or task.
_evaluated: ContextVar[nn.Module | None] = ContextVar("castream_evaluated", default=None)
# Nodes of autograd that only move or convert numbers: what becomes of a map between where it is carried on and here.
_LAYOUT_NODES = {
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Permute", "ReshapeAlias", "Slice", "Squeeze", "ToCopy", "Transpose"),
        *("UnsafeView", "Unsqueeze", "View"),
    )
}


def _training_modules(model: nn.Module) -> list[nn.Module]:
    """Every module in train mode; `model.modules()`, which tracks names and repeats, takes five times as long."""
    found, pending = [], [model]
    while pending:
        module = pending.pop()
        if module.training:
            found.append(module)
        pending.extend(child for child in module._modules.values() if child is not None)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient, autocast or inference mode; afterwards every submodule has its own flag again.

    Poolers and classifiers are cheap and their gradients small: they run in the model's dtype. The tensors made inside
    are ordinary ones, which autograd accepts, also within a caller's `torch.inference_mode()`.
    """
    nested = _evaluated.get() is model  # then no module is in train mode, and none needs to be looked at
    training = [] if nested else _training_modules(model)
    for module in training:
        module.training = False
    token = _evaluated.set(model)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        _evaluated.reset(token)
        for module in training:
            module.training = True


@dataclass
class Pooled:
    """One pooling of a batch.

    Args:
        pooler_output: (batch_size, num_channels), or (batch_size, num_labels, num_channels) for class-specific queries.
        attention_maps: one per block, (batch_size, num_heads or num_labels, height_l, width_l).
        logits: (batch_size, num_labels).
    """

    pooler_output: torch.Tensor
    attention_maps: tuple[torch.Tensor, ...]
    logits: torch.Tensor


@dataclass
class Features:
    """A batch after its one pass through the backbone; `extract` makes it, every method and pooling reads it.

    Args:
        model: the classifier.
        pixel_values: (batch_size, num_channels, height, width), on the model's device and in its dtype.
        feature_maps: what the stream reads, shallow to deep, the pooled map last.
        cls_token: as the model's `extract_features` returns it, None where the classifier reads none.
        autocast_dtype: what the backbone ran under, None for no autocast.
        evidence_features: what evidence blocks read, the pooled map last; empty without such a block.
    """

    model: nn.Module
    pixel_values: torch.Tensor
    feature_maps: Sequence[torch.Tensor]
    cls_token: torch.Tensor | None
    autocast_dtype: torch.dtype | None = None
    evidence_features: tuple[torch.Tensor, ...] = ()
    _pooled: dict[str, Pooled] = field(default_factory=dict)

    def pool(self, pooling: str | None = None) -> Pooled:
        """Pool and classify, once per pooling.

        Raises:
            ValueError: on an unknown pooling.
        """
        pooling = resolve_pooling(self.model.config, pooling)
        if pooling not in self._pooled:
            with evaluating(self.model):
                self._pooled[pooling] = pool_and_classify(self.model, self.feature_maps, self.cls_token, pooling)
        return self._pooled[pooling]

    def logits(self, pooling: str | None = None) -> torch.Tensor:
        """Logits (batch_size, num_labels), as the model's forward pass returns them."""
        return self.pool(pooling).logits

    def select(self, index: torch.Tensor) -> "Features":
        """The items at `index` (a LongTensor; repeats allowed), e.g. one for each of an image's labels."""
        cls_token = None if self.cls_token is None else self.cls_token[index]
        feature_maps, evidence_features = (
            tuple(one[index] for one in maps) for maps in (self.feature_maps, self.evidence_features)
        )
        return replace(
            self,
            pixel_values=self.pixel_values[index],
            feature_maps=feature_maps,
            cls_token=cls_token,
            evidence_features=evidence_features,
            _pooled={},
        )


def extract(model: nn.Module, pixel_values: torch.Tensor) -> Features:
    """Run the backbone once, for any number of explanations, under the caller's autocast if there is one.

    Args:
        model: a CAStreamForImageClassification.
        pixel_values: (batch_size, num_channels, height, width), normalised.

    Raises:
        ValueError: if the model is of another kind, or `pixel_values` no tensor, empty, or of another shape.
    """
    if not (hasattr(model, "castream") and hasattr(model, "classify")):
        raise ValueError(
            f"model must be a CAStreamForImageClassification, got {type(model).__name__}: load it with "
            "AutoModelForImageClassification, and unwrap it if a trainer wrapped it."
        )
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.numel():
        got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(
            "pixel_values must have the shape (batch_size, num_channels, height, width), with at least one image, got "
            f"{got}: pass image_processor(images, return_tensors='pt')['pixel_values']."
        )
    pixel_values = pixel_values.detach().to(model.device, model.dtype)
    kind = model.device.type
    autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with evaluating(model):
        return run_features(model, pixel_values, autocast_dtype)


def run_features(model: nn.Module, pixel_values: torch.Tensor, autocast_dtype: torch.dtype | None) -> Features:
    """The features of a batch that lies on the model's device in its dtype; its pixels keep the backbone's layout."""
    pixel_values = _channels_last(pixel_values)
    feature_maps, cls_token = run_backbone(model, pixel_values, autocast_dtype)
    evidence_features = model.castream.evidence_features(feature_maps) if _has_evidence(model) else ()
    feature_maps = feature_maps[-len(model.config.stream_layers) :]
    return Features(model, pixel_values, feature_maps, cls_token, autocast_dtype, evidence_features)


def _has_evidence(model: nn.Module) -> bool:
    return bool(model.config.evidence_queries)


def run_backbone(
    model: nn.Module, pixel_values: torch.Tensor, autocast_dtype: torch.dtype | None
) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
    """Feature maps and CLS token, in the model's dtype whatever autocast's is."""
    pixel_values = _channels_last(pixel_values)
    folding = getattr(model.castream, "folding", nullcontext)  # a model of an earlier version's code has none
    with torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None), folding():
        feature_maps, cls_token = model.castream.extract_features(pixel_values)
    cls_token = None if cls_token is None else cls_token.to(model.dtype)
    return _InDtype(feature_maps, model.dtype), cls_token


class _InDtype(Sequence):
    """Feature maps of autocast's dtype in another one: each is converted when it is read, as few readers read all, and
    the pooled one, which all of them read, at once."""

    def __init__(self, feature_maps: Sequence[torch.Tensor], dtype: torch.dtype):
        pooled = [feature_map.to(dtype) for feature_map in feature_maps[-1:]]
        self._dtype, self._maps = dtype, (*feature_maps[:-1], *pooled)

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, index: int | slice) -> "torch.Tensor | _InDtype":
        if isinstance(index, slice):
            return _InDtype(self._maps[index], self._dtype)
        return self._maps[index].to(self._dtype)


def _channels_last(pixel_values: torch.Tensor) -> torch.Tensor:
    """Images whose pixels' channels lie side by side: a CPU's convolutions take up to a third less time then."""
    if isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 4:  # anything else is refused by the model
        return pixel_values.contiguous(memory_format=torch.channels_last)
    return pixel_values


def pool_and_classify(
    model: nn.Module, feature_maps: Sequence[torch.Tensor], cls_token: torch.Tensor | None, pooling: str
) -> Pooled:
    """The part of the forward pass that differs between poolings."""
    pooler_output, attention_maps = model.castream.pool_features(feature_maps, pooling)
    return Pooled(pooler_output, attention_maps, model.classify(pooler_output, cls_token))


def _score(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum of each item's target logit: its gradient is each item's own, as items do not meet."""
    return logits.gather(1, target[:, None]).sum()


def pooled_direction(features: Features, target: torch.Tensor, pooling: str) -> torch.Tensor:
    """v_c, the derivative of the target's logit for a shift of all positions of the pooled feature map alike.

    q_L comes from the shallower maps and softmax does not see a shift of all scores, so a shift by s moves the pooled
    vector by W_L s (by s under global average pooling): v_c = W_L^T d logit_c / d pooler_output, which needs no
    gradient at the map. With a linear classifier it is one matrix product.

    Returns:
        (batch_size, num_channels), float32: sum_p d logit_c / d F_L(p).
    """
    config = features.model.config
    if pooling == "ca" and (config.unit_keys or config.preserve_norm):  # a shift turns the keys and changes the length
        return pooled_map_gradients(features, target, pooling).sum((2, 3))
    return logit_direction(features, target, pooling)


def logit_direction(features: Features, target: torch.Tensor, pooling: str) -> torch.Tensor:
    """The direction v_c of logit_c = bias + sum_p a(p) v_c . F(p), (batch_size, num_channels), float32.

    W_L^T d logit_c / d pooler_output; where the norm is preserved, times the image's ratio of the two lengths.
    """
    direction = _pooled_gradients(features, target, pooling)
    if pooling == "ca" and features.model.config.preserve_norm:
        direction = direction * _norm_ratio(features)
    projection = features.model.castream.stream.blocks[-1].projection
    if pooling != "ca" or type(projection) is nn.Identity:
        return direction.float()
    if type(projection) is nn.Linear:
        return (direction @ projection.weight).float()
    with torch.enable_grad():  # a linear map of another kind, e.g. with an adapter
        origin = torch.zeros_like(features.feature_maps[-1][:, :, 0, 0], requires_grad=True)
        return torch.autograd.grad(projection(origin), origin, direction)[0].float()


def _norm_ratio(features: Features) -> torch.Tensor:
    """||mean_p F_L|| / ||q_{L+1}||, (batch_size, 1)."""
    query, _ = features.model.castream.stream(features.feature_maps)
    return features.feature_maps[-1].mean((2, 3)).norm(dim=1, keepdim=True) / query.squeeze(1).norm(dim=1, keepdim=True)


def _pooled_gradients(features: Features, target: torch.Tensor, pooling: str) -> torch.Tensor:
    """d logit_c / d pooler_output, (batch_size, num_channels); of class-specific queries, for the target's token."""
    model = features.model
    if type(model.classifier) is nn.Linear and model.has_linear_readout:  # constant: the class's weights
        return model.classifier.weight[target, -features.feature_maps[-1].shape[1] :]
    with torch.enable_grad():
        pooler_output = features.pool(pooling).pooler_output.detach().requires_grad_()
        logits = model.classify(pooler_output, features.cls_token)
        (gradients,) = torch.autograd.grad(_score(logits, target), pooler_output)
    return gradients.sum(1) if gradients.ndim == 3 else gradients


def pooled_map_gradients(features: Features, target: torch.Tensor, pooling: str) -> torch.Tensor:
    """d logit_c / d F_L, through pooler and classifier only: (batch_size, num_channels, height, width), float32."""
    with torch.enable_grad():
        leaf = features.feature_maps[-1].detach().requires_grad_()
        pooled = pool_and_classify(features.model, (*features.feature_maps[:-1], leaf), features.cls_token, pooling)
        (gradients,) = torch.autograd.grad(_score(pooled.logits, target), leaf)
    return gradients.float()


def inner_map_gradients(
    features: Features, target: torch.Tensor, pooling: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """F_l and d logit_c / d F_l, float32, for a map before the pooled one, through the rest of the backbone and through
    the stream.

    This is the one gradient that goes through the backbone: a second forward pass that records the graph, and a
    backward pass from the logit down to F_l.

    For the last layer of a source that reads a CLS token, F_l are the patch tokens that the last block reads, after its
    norm if it begins with one. After that block only the CLS token has a gradient; and before the norm, which does not
    see a token's length, the gradient is perpendicular to the token.

    Raises:
        ValueError: where the backbone does not carry that map on, so that no such gradient exists.
    """
    model, config = features.model, features.model.config
    is_last = layer == len(features.feature_maps) - 1
    name = config.gradient_layer if is_last else config.stream_layers[layer]
    with torch.enable_grad():
        pixel_values = features.pixel_values.clone().requires_grad_()  # a frozen backbone records no graph without
        with _Norms() as norms:
            feature_maps, cls_token = run_backbone(model, pixel_values, features.autocast_dtype)
        feature_map = feature_maps[config.feature_layers.index(name)]
        edge = _edge_on_path(feature_map, feature_maps[-1] if config.source_pooling == "gap" else cls_token)
        if edge is None:
            raise ValueError(
                f"layer {name!r} has no gradient: the backbone returns it but computes its later maps from something "
                "else. Use the pooled layer (layer=-1), or a method without gradients."
            )
        score = _score(pool_and_classify(model, feature_maps, cls_token, pooling).logits, target)
        if is_last and (tokens := norms.of(edge)) is not None:
            pair = (tokens.detach(), torch.autograd.grad(score, tokens)[0])
            return tuple(model.castream.backbone.to_map(one.float(), pixel_values, "NLC") for one in pair)
        (gradients,) = torch.autograd.grad(score, edge, retain_graph=True)
        return feature_map.detach().float(), _to_layout_of(feature_map, edge, gradients).float()


class _Norms(TorchFunctionMode):
    """Remembers what each norm of tokens (batch_size, num_tokens, num_channels) read and returned."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("layer_norm", "rms_norm") and output.ndim == 3 and output.requires_grad:
            self.calls.append((args[0], output))
        return output

    def of(self, edge: GradientEdge) -> torch.Tensor | None:
        """What the first norm returned that read the tensor at an edge of the graph; None where none did."""
        return next((output for read, output in self.calls if get_gradient_edge(read) == edge), None)


class _LastAttention(TorchFunctionMode):
    """Keeps the last attention of a forward pass whose keys are an image's patches, after any prefix tokens: of its
    first query, the CLS token's or an attention pooling's.

    It sees the calls of `scaled_dot_product_attention` and softmax, and so needs to know no network's layers.
    """

    def __init__(self, num_positions: int, num_prefix_tokens: int):
        super().__init__()
        self.num_positions, self.num_prefix_tokens = num_positions, num_prefix_tokens
        self.weights: torch.Tensor | None = None  # (batch_size, num_heads, num_positions)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(_first_query_attention(*args, **kwargs))
        elif getattr(func, "__name__", "") == "softmax" and output.ndim in (3, 4):
            self._keep(output[:, :, 0] if output.ndim == 4 else output)
        return output

    def _keep(self, weights: torch.Tensor) -> None:
        if 0 <= weights.shape[-1] - self.num_positions <= self.num_prefix_tokens:
            self.weights = weights[..., -self.num_positions :].float()


def _first_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, *_, **options
) -> torch.Tensor:
    """(batch_size, num_heads, num_keys), of the arguments of `scaled_dot_product_attention`."""
    scale = options.get("scale") or query.shape[-1] ** -0.5
    scores = (query[:, :, :1] * scale) @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask[..., :1, :], -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask[..., :1, :]
    return scores.float().softmax(-1)[:, :, 0]


def source_attention(features: Features) -> torch.Tensor | None:
    """The attention by which the source's readout was made, (batch_size, num_heads, height_L, width_L), float32: the
    CLS token's in the last block, or the attention pooling's; None where the network's attention is of another kind.

    It takes a forward pass of its own. It sums to 1 over positions and the prefix tokens, which are left out.
    """
    size = features.feature_maps[-1].shape[2:]
    recorder = _LastAttention(size.numel(), features.model.castream.num_prefix_tokens)
    with evaluating(features.model), recorder:
        run_backbone(features.model, features.pixel_values, features.autocast_dtype)
    return None if recorder.weights is None else recorder.weights.unflatten(2, size)


def _edge_on_path(feature_map: torch.Tensor, output: torch.Tensor) -> GradientEdge | None:
    """Where the graph of `output` meets `feature_map`, seen through transposes and the like; None if nowhere."""
    ancestors, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            pending += [parent for parent, _ in node.next_functions]
    edge = get_gradient_edge(feature_map)
    while edge.node not in ancestors:
        if edge.node.name() not in _LAYOUT_NODES:
            return None
        edge = GradientEdge(*edge.node.next_functions[0])
    return edge


def _to_layout_of(feature_map: torch.Tensor, edge: GradientEdge, gradients: torch.Tensor) -> torch.Tensor:
    """Rearrange the gradient at `edge` as the backbone rearranged the tensor there into `feature_map`.

    That rearrangement P is linear, and autograd yields P^T; the derivative of P^T v for v is P.
    """
    if edge == get_gradient_edge(feature_map):
        return gradients
    variable = torch.zeros_like(feature_map, requires_grad=True)
    (transposed,) = torch.autograd.grad(feature_map, edge, variable, create_graph=True)
    return torch.autograd.grad(transposed, variable, gradients)[0]


__all__ = ["Features", "Pooled", "extract"]
