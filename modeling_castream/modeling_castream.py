"""CA-Stream models: a stream of cross-attention poolings beside a frozen backbone (arXiv:2404.14996).

Symbols of the paper and their names here, l = 0..L being the depths the stream reads:

    q_l      query        (batch_size, num_queries, num_channels_l); one query, or one a class
    F_l      feature_map  (batch_size, num_channels_l, height_l, width_l)
    a_l      attention    (batch_size, num_queries * heads, height_l, width_l), softmax over positions
    W_l, b_l projection   num_channels_l -> num_channels_{l+1}; the last one keeps num_channels_L

    scores_l(p) = q_l . F_l(p) / sqrt(d_l)          or, with unit keys, q_l . F_l(p) / ||F_l(p)||
    a_l         = softmax_p scores_l
    q_{l+1}     = W_l sum_p a_l(p) F_l(p) + b_l
    logits      = classifier(q_{L+1})               or, preserving the norm, of unit(q_{L+1}) ||mean_p F_L(p)||
                = classifier(c + q_{L+1})           where the source reads a vector c, its CLS token, and no average

Beside the stream may stand evidence blocks, whose equations are in `evidence_castream`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .backbone_castream import (
    build_backbone,
    build_layers,
    feature_channels,
    num_input_channels,
    read_feature_maps,
)
from .configuration_castream import CAStreamConfig, resolve_pooling
from .evidence_castream import EvidenceBlock, unit
from .folding_castream import folding, inference_backbone
from .image_processing_castream import CAStreamImageProcessor  # noqa: F401 - saving a model copies what this imports
from .network_castream import NECK, ClassifierNetwork


@dataclass
class CAStreamModelOutput(ModelOutput):
    """
    Output of [`CAStreamModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            The feature map that is pooled.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, num_channels)`):
            q_{L+1} (`pooling="ca"`) or the mean over positions (`pooling="source"`; zeros where the source averages
            nothing). With class-specific queries and `pooling="ca"`, `(batch_size, num_labels, num_channels)`.
        attention_maps (`tuple(torch.FloatTensor)`, one per block, `(batch_size, num_heads, height_l, width_l)`):
            The stream's attention, in [0, 1], summing to 1 over positions; computed under either pooling. With
            class-specific queries the second axis runs over the classes.
        cls_token (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*):
            The backbone's CLS token, or its attention pooling's result, where the classifier reads it;
            `(batch_size, 2, hidden_size)` with a distillation token.
        evidence_features (`tuple(torch.FloatTensor)`, *optional*, with an evidence block):
            The feature maps that it reads, the pooled one last.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
            The feature maps that the blocks read.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    attention_maps: tuple[torch.FloatTensor, ...] | None = None
    cls_token: torch.FloatTensor | None = None
    evidence_features: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class CAStreamImageClassifierOutput(ModelOutput):
    """
    Output of [`CAStreamForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            Cross-entropy, or binary cross-entropy for `problem_type="multi_label_classification"`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores before softmax (single label) or sigmoid (multi-label).
        attention_maps (`tuple(torch.FloatTensor)`, one per block, `(batch_size, num_heads, height_l, width_l)`):
            The stream's attention, in [0, 1], summing to 1 over positions; computed under either pooling.
        evidence_map (`torch.FloatTensor` of shape `(batch_size, height, width)`, *optional*, with an evidence block):
            Of the first of `config.evidence_queries`, in [0, 1], summing to 1 over positions.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
            The feature maps that the blocks read.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    attention_maps: tuple[torch.FloatTensor, ...] | None = None
    evidence_map: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


def attention_scores(
    query: torch.Tensor, feature_map: torch.Tensor, num_heads: int, unit_keys: bool = False
) -> torch.Tensor:
    """Similarity of queries and positions: q_l . F_l(p) / sqrt(d_l), in float32 or better.

    With several heads the channels split into `num_heads` groups, and the scale stays that of all d_l channels, as in
    the authors' code.

    Args:
        query: (batch_size, num_queries, num_channels).
        feature_map: (batch_size, num_channels, height, width).
        unit_keys: whether the features are scaled to length 1 instead of the scores by 1 / sqrt(d_l).

    Returns:
        (batch_size, num_queries * num_heads, height * width).
    """
    if unit_keys:
        feature_map = unit(feature_map)
    batch_size, num_queries, num_channels = query.shape
    positions = feature_map.flatten(2).unflatten(1, (num_heads, -1))  # (batch, heads, channels / heads, positions)
    queries = query.unflatten(2, (num_heads, -1)).transpose(1, 2)  # (batch, heads, queries, channels / heads)
    scores = queries @ positions
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (1 if unit_keys else num_channels**-0.5)
    return scores.transpose(1, 2).reshape(batch_size, num_queries * num_heads, -1)


def attend(attention: torch.Tensor, feature_map: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Weighted mean of a feature map: sum_p a_l(p) F_l(p), head by head.

    Args:
        attention: (batch_size, num_queries * num_heads, height * width), in the dtype of the feature map.
        feature_map: (batch_size, num_channels, height, width).

    Returns:
        (batch_size, num_queries, num_channels).
    """
    positions = feature_map.flatten(2).unflatten(1, (num_heads, -1))  # (batch, heads, channels / heads, positions)
    weights = attention.unflatten(1, (-1, num_heads)).transpose(1, 2)  # (batch, heads, queries, positions)
    pooled = weights @ positions.transpose(2, 3)  # (batch, heads, queries, channels / heads)
    return pooled.transpose(1, 2).flatten(2)


class CrossAttentionPooling(nn.Module):
    """One block of the stream: cross-attention of the query with a feature map, then a linear map of what it gathered.

    Args:
        in_channels: d_l.
        out_channels: d_{l+1}, or None for no linear map.
        num_heads: must divide `in_channels`.
        unit_keys: see `attention_scores`.
    """

    def __init__(self, in_channels: int, out_channels: int | None, num_heads: int, unit_keys: bool = False):
        super().__init__()
        if in_channels % num_heads:
            raise ValueError(
                f"num_attention_heads must divide the channels of every stream layer, got {num_heads} for "
                f"{in_channels} channels."
            )
        self.num_heads, self.unit_keys = num_heads, unit_keys
        self.projection = nn.Identity() if out_channels is None else nn.Linear(in_channels, out_channels)

    def forward(self, query: torch.Tensor, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, queries, d_l) and (batch, d_l, height, width) -> (batch, queries, d_{l+1}) and the attention
        (batch, queries * heads, height, width)."""
        scores = attention_scores(query, feature_map, self.num_heads, self.unit_keys)
        attention = scores.softmax(-1).to(feature_map.dtype)
        pooled = attend(attention, feature_map, self.num_heads)
        return self.projection(pooled), attention.unflatten(2, feature_map.shape[2:])


class CrossAttentionStream(nn.Module):
    """The stream: one learned query carried through a cross-attention pooling at every depth.

    Args:
        num_channels: d_0..d_L.
        num_queries: 1, or the number of classes.
        num_heads: heads of every block.
        output_projection: whether the last block has its W_L.
        unit_keys: see `attention_scores`.
    """

    def __init__(
        self,
        num_channels: list[int],
        num_queries: int,
        num_heads: int,
        output_projection: bool,
        unit_keys: bool = False,
    ):
        super().__init__()
        last = num_channels[-1] if output_projection else None
        self.query = nn.Parameter(torch.zeros(num_queries, num_channels[0]))
        self.blocks = nn.ModuleList(
            CrossAttentionPooling(in_channels, out_channels, num_heads, unit_keys)
            for in_channels, out_channels in zip(num_channels, [*num_channels[1:], last], strict=True)
        )

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Feature maps, shallow to deep -> q_{L+1} (batch, queries, d_L) and one attention map per block.

        Feature maps before the stream's, which only evidence blocks read, are passed over.
        """
        feature_maps = feature_maps[-len(self.blocks) :]
        query = self.query.expand(feature_maps[0].shape[0], -1, -1)
        attention_maps = ()
        for block, feature_map in zip(self.blocks, feature_maps, strict=True):
            query, attention = block(query, feature_map)
            attention_maps += (attention,)
        return query, attention_maps


class CAStreamPreTrainedModel(PreTrainedModel):
    """Initialisation, and the rule that what is frozen stays frozen."""

    config: CAStreamConfig
    config_class = CAStreamConfig
    base_model_prefix = "castream"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CrossAttentionStream"]  # noqa: RUF012 - the kind is PreTrainedModel's

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, EvidenceBlock):
            module.reset_parameters()
        if not isinstance(module, CrossAttentionStream):
            return
        reference = self.config.init == "reference"
        init.normal_(module.query, mean=1.0) if reference else init.zeros_(module.query)
        for block in module.blocks:
            if isinstance(block.projection, nn.Linear):
                if reference:
                    init.xavier_uniform_(block.projection.weight)
                elif block is module.blocks[-1] and self.config.source_pooling == "gap":
                    init.eye_(block.projection.weight)
                else:
                    init.zeros_(block.projection.weight)
                init.zeros_(block.projection.bias)

    def frozen_modules(self) -> list[nn.Module]:
        """The modules that `config.freeze_backbone` and `config.freeze_classifier` keep as they are."""
        return []

    def freeze(self) -> None:
        """Take the gradient off the frozen modules. Construction and `from_pretrained` do so, nothing else does."""
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True):
        """Set train or eval mode; what is frozen stays in eval mode. `requires_grad` is the caller's."""
        super().train(mode)
        for module in self.frozen_modules():
            nn.Module.train(module, False)
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As any model's; frozen again afterwards, since transformers' loading gives every weight a gradient."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()  # a tuple with `output_loading_info`
        return loaded


def select_hidden_states(
    feature_maps: tuple[torch.Tensor, ...], output_hidden_states: bool | int | list[int]
) -> tuple[torch.Tensor | None, ...] | None:
    """What `output_hidden_states` asks for, as in transformers' models: all, none, or those at the given indices."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return feature_maps if output_hidden_states else None
    selected = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    kept = {index % len(feature_maps) for index in selected}
    return tuple(feature_map if index in kept else None for index, feature_map in enumerate(feature_maps))


class CAStreamModel(CAStreamPreTrainedModel):
    """A backbone, what lies between its last feature map and the pooling, and the stream.

    Raises:
        ValueError: on a config whose stream layers, channels and heads do not fit the backbone.
    """

    def __init__(self, config: CAStreamConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self._check_source()
        self.neck = nn.Identity()
        lacks_channels = config.evidence_layers is not None and config.evidence_channels is None
        if config.stream_channels is None or config.neck_layers or lacks_channels:
            channels = feature_channels(config)
            deepest = getattr(self.backbone, "out_features", config.stream_layers)[-1]
            self.neck, channels[NECK] = build_layers(
                config.neck_layers, channels[deepest], spatial=True, name="neck_layers"
            )
            if config.stream_channels is None:
                config.stream_channels = [channels[name] for name in config.stream_layers]
            if lacks_channels:
                config.evidence_channels = [channels[name] for name in config.evidence_layers]
        num_queries = config.num_labels if config.query == "class_specific" else 1
        self.stream = CrossAttentionStream(
            config.stream_channels,
            num_queries,
            config.num_attention_heads,
            config.output_projection,
            config.unit_keys,
        )
        self.supports_gradient_checkpointing = any(
            hasattr(module, "gradient_checkpointing") for module in self.backbone.modules()
        )
        self.post_init()
        self.freeze()
        self.train(self.training)

    def _check_source(self) -> None:
        """Refuse what has no meaning, or no zero to begin at, beside a source that averages nothing."""
        config = self.config
        resolve_pooling(config, None)
        if config.source_pooling != "gap" and (config.preserve_norm or not config.output_projection):
            name = "preserve_norm=True" if config.preserve_norm else "output_projection=False"
            raise ValueError(
                f"{name} needs a source that averages: this one's {config.source_readout} readout gets what the stream "
                "pools added to it, which begins at zero."
            )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches': CLS, distillation and register tokens."""
        if self.config.classifier_cls_token:
            return 1 + getattr(self.backbone.config, "num_register_tokens", 0)
        return getattr(self.backbone, "num_prefix_tokens", 0)

    def frozen_modules(self) -> list[nn.Module]:
        return [self.backbone, self.neck] if self.config.freeze_backbone else []

    # The context in which `extract_features` runs a folded copy. Callers take it from the model: a model and a pipeline
    # may be of two copies of this code, a package's and a Hub folder's.
    folding = staticmethod(folding)

    def extract_features(self, pixel_values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The backbone's part of the forward pass, which all poolings and explanations of an image share.

        Args:
            pixel_values: (batch_size, num_channels, height, width), normalised.

        Returns:
            The feature maps of `config.feature_layers`, the pooled one last; the CLS token where the classifier reads
            it.

        Raises:
            ValueError: on an input that is not such a batch.
        """
        expected = num_input_channels(self.config)
        if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(
                f"pixel_values must have the shape (batch_size, {expected}, height, width), got {shape}: use the "
                f"model's image processor{', with images converted to RGB' if expected == 3 else ''}."
            )
        backbone = inference_backbone(self.backbone, pixel_values)
        return read_feature_maps(backbone, self.neck, self.config, pixel_values)

    def pool_features(
        self, feature_maps: tuple[torch.Tensor, ...], pooling: str | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Pool feature maps into one vector.

        Args:
            feature_maps: as `extract_features` returns them.
            pooling: `"ca"`, `"source"`, or None for `config.pooling`.

        Returns:
            The pooled vector (batch_size, num_channels), zeros where the source averages nothing; or (batch_size,
            num_labels, num_channels) where queries are class-specific and pooling is `"ca"`; and the attention maps
            that pooled it: none under `"source"`, which does not run the stream.
        """
        pooling = resolve_pooling(self.config, pooling)
        if pooling != "ca":
            mean = feature_maps[-1].mean((2, 3))
            return (mean if pooling == "gap" else torch.zeros_like(mean)), ()
        query, attention_maps = self.stream(feature_maps)
        if self.config.preserve_norm:
            length = feature_maps[-1].mean((2, 3)).norm(dim=1)[:, None, None]
            query = unit(query, dim=2) * length
        return (query if self.config.query == "class_specific" else query.squeeze(1)), attention_maps

    def evidence_features(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Those of the feature maps of `extract_features` that evidence blocks read, the pooled one last."""
        return tuple(feature_maps[self.config.feature_layers.index(name)] for name in self.config.evidence_layers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pooling: str | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> CAStreamModelOutput:
        """Pool a batch of images; see [`CAStreamModelOutput`].

        Args:
            pixel_values: (batch_size, num_channels, height, width), normalised.
            pooling: `"ca"`, `"source"`, or None for `config.pooling`.
            output_hidden_states: whether to return the feature maps that the blocks read, or the indices of those to
                return, with None in place of the others.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        feature_maps, cls_token = self.extract_features(pixel_values)
        evidence_features = self.evidence_features(feature_maps) if self.config.evidence_queries else None
        pooler_output, attention_maps = self.pool_features(feature_maps, pooling)
        if not attention_maps:
            _, attention_maps = self.stream(feature_maps)
        return CAStreamModelOutput(
            last_hidden_state=feature_maps[-1],
            pooler_output=pooler_output,
            attention_maps=attention_maps,
            cls_token=cls_token,
            evidence_features=evidence_features,
            hidden_states=select_hidden_states(feature_maps[-len(self.stream.blocks) :], output_hidden_states),
        )


class CAStreamForImageClassification(CAStreamPreTrainedModel):
    """An image classifier whose pooling is the stream or, from the same checkpoint, the source's own readout."""

    def __init__(self, config: CAStreamConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.castream = CAStreamModel(config)
        self.head, num_features = build_layers(
            config.head_layers, config.stream_channels[-1], spatial=False, name="head_layers"
        )
        num_features *= 2 if config.classifier_cls_token else 1
        if isinstance(self.castream.backbone, ClassifierNetwork):
            num_features = self.castream.backbone.num_features
        has_classifier = num_features is not None and config.num_labels > 0
        self.classifier = nn.Linear(num_features, config.num_labels) if has_classifier else nn.Identity()
        self.evidence = nn.ModuleDict()
        for query in config.evidence_queries or []:
            self.evidence[query] = EvidenceBlock(query, *reversed(config.evidence_channels))
        self._check_memory()
        self.supports_gradient_checkpointing = self.castream.supports_gradient_checkpointing
        self.post_init()
        self.freeze()
        self.train(self.training)

    def frozen_modules(self) -> list[nn.Module]:
        return self.castream.frozen_modules() + ([self.head, self.classifier] if self.config.freeze_classifier else [])

    def explainer(self, image_processor):
        """The image-explanation pipeline of this very model, for images as `image_processor` prepares them.

        Saving, and loading with `trust_remote_code=True`, carry along whatever the model's code imports: this import
        brings the pipeline into every saved folder.
        """
        from .pipeline_castream import ImageExplanationPipeline  # here, since importing pipelines takes a second

        return ImageExplanationPipeline(model=self, image_processor=image_processor)

    def readout(self, pooler_output: torch.Tensor, cls_token: torch.Tensor | None = None) -> torch.Tensor:
        """What the linear classifier reads, (batch_size, num_features), of a pooled vector and a CLS token.

        With class-specific queries one for each class: (batch_size, num_labels, num_features).
        """
        if isinstance(self.castream.backbone, ClassifierNetwork):
            return self.castream.backbone.readout(pooler_output, cls_token)
        features = self.head(pooler_output)
        if cls_token is None:
            return features
        if features.ndim == 3:
            cls_token = cls_token[:, None].expand(-1, features.shape[1], -1)
        return torch.cat([cls_token, features], dim=-1)

    @property
    def has_linear_readout(self) -> bool:
        """Whether the linear classifier reads the pooled vector itself, or the end of what it reads is that vector."""
        backbone = self.castream.backbone
        if isinstance(backbone, ClassifierNetwork):
            return backbone.num_features == self.config.stream_channels[-1] and backbone.reads_pooled_vectors()
        return not len(self.head)

    def classify(self, pooler_output: torch.Tensor, cls_token: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch_size, num_labels) of what `castream.pool_features` and `castream.extract_features` returned."""
        features = self.readout(pooler_output, cls_token)
        if features.ndim == 3:  # class c reads its own token: the diagonal of classifier(token_c)
            return (features * self.classifier.weight).sum(-1) + self.classifier.bias
        return self.classifier(features)

    def _check_memory(self) -> None:
        """Refuse a memory whose rows are no directions of the pooled feature map."""
        if "memory" not in self.evidence:
            return
        num_channels, classifier = self.config.evidence_channels[-1], self.classifier
        if not isinstance(classifier, nn.Linear) or classifier.in_features % num_channels:
            width = getattr(classifier, "in_features", "no linear layer")
            raise ValueError(
                f"evidence_queries=['memory'] needs a classifier that reads the {num_channels} channels of the pooled "
                f"feature map, got {width}: use ['constant']."
            )

    def evidence_scores(
        self,
        query: str,
        evidence_features: tuple[torch.Tensor, ...],
        cls_token: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What an evidence block says of each position before the softmax, (batch_size, height, width), float32.

        Args:
            query: the block, one of `config.evidence_queries`.
            evidence_features: as `castream.evidence_features` returns them.
            cls_token: as `castream.extract_features` returns it.
            target: class ids (batch_size,), for the evidence of these classes; None: of the prediction.
        """
        pooled, _ = self.castream.pool_features(evidence_features, "source")
        logits = self.classify(pooled, cls_token)
        memory = self.classifier.weight[:, -evidence_features[-1].shape[1] :]
        return self.evidence[query].scores(evidence_features, logits, memory - memory.mean(0), target)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What logits (..., num_labels) say in [0, 1], float32: softmax over classes; for a multi-label model, and for
        a single logit, each class's own sigmoid.

        Raises:
            ValueError: for a regression, whose outputs are no classes'.
        """
        if self.config.problem_type == "regression":
            raise ValueError("problem_type is 'regression': its outputs are values, not scores of classes.")
        logits = logits.float()
        independent = self.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
        return logits.sigmoid() if independent else logits.softmax(-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pooling: str | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> CAStreamImageClassifierOutput:
        """Classify a batch of images; see [`CAStreamImageClassifierOutput`].

        Args:
            pixel_values: (batch_size, num_channels, height, width), normalised.
            labels: class ids (batch_size,), or 0/1 floats (batch_size, num_labels) for multi-label problems.
            pooling: `"ca"`, `"source"`, or None for `config.pooling`.
            output_hidden_states: whether to return the feature maps that the blocks read, or the indices of those to
                return, with None in place of the others.
        """
        outputs = self.castream(pixel_values, pooling=pooling, output_hidden_states=output_hidden_states)
        logits = self.classify(outputs.pooler_output, outputs.cls_token)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        evidence_map = None
        if self.evidence:
            first = self.config.evidence_queries[0]
            scores = self.evidence_scores(first, outputs.evidence_features, outputs.cls_token)
            evidence_map = scores.flatten(1).softmax(-1).view_as(scores)
        return CAStreamImageClassifierOutput(
            loss=loss,
            logits=logits,
            attention_maps=outputs.attention_maps,
            evidence_map=evidence_map,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["CAStreamForImageClassification", "CAStreamModel", "CAStreamPreTrainedModel"]
