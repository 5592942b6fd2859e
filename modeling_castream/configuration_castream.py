"""Configuration of CA-Stream models (arXiv:2404.14996)."""

import copy

from .requirements_castream import check_versions  # noqa: F401 # isort: skip - first: says in one line what is too old

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, ResNetConfig
from transformers.configuration_utils import PreTrainedConfig

POOLINGS = ("ca", "gap", "source")
VARIANTS = ("stream", "final")
INITS = ("gap", "reference")
QUERIES = ("class_agnostic", "class_specific")
EVIDENCE_QUERIES = ("memory", "constant")

# Layers that a family's own classifier puts between its last feature map and the pooling (neck) or between the pooling
# and the linear classifier (head), and that its AutoBackbone leaves out.
_FAMILY_NECK = {"swin": [{"type": "layer_norm", "eps_from": "layer_norm_eps"}]}
_FAMILY_HEAD = {
    "convnext": [{"type": "layer_norm", "eps_from": "layer_norm_eps"}],
    "convnextv2": [{"type": "layer_norm", "eps_from": "layer_norm_eps"}],
}


def custom_pipelines() -> dict[str, dict]:
    """What a model's config.json tells `pipeline()` about tasks whose code comes with the model."""
    return {
        "image-explanation": {
            "impl": "pipeline_castream.ImageExplanationPipeline",
            "pt": ["AutoModelForImageClassification"],
            "type": "image",
        }
    }


def resolve_pooling(config, pooling: str | None) -> str:
    """The pooling that a call asks for: `"ca"`, or `config.source_pooling` under either of its names; None: the
    config's.

    Raises:
        ValueError: on any other, and on `"gap"` for a source that does not average.
    """
    pooling = config.pooling if pooling is None else pooling
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, or None for the config's, got {pooling!r}.")
    if pooling == "gap" and config.source_pooling != "gap":
        read = "a CLS token" if config.source_readout == "token" else "what an attention pooling returns"
        raise ValueError(
            f"pooling='gap' does not exist here: this model's source reads {read} and averages nothing; "
            "pooling='source' is its own prediction."
        )
    return "ca" if pooling == "ca" else config.source_pooling


class TorchvisionConfig(PreTrainedConfig):
    """A torchvision classifier as a backbone.

    Args:
        name: torchvision's, e.g. `"resnet50"`.
        options: of `torchvision.models.get_model`, besides weights and number of classes.
        image_size: height and width of the images that the network is made for.
    """

    model_type = "torchvision"

    name: str = "resnet50"
    options: dict | None = None
    image_size: int = 224


@strict
class CAStreamConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CAStreamModel`] or [`CAStreamForImageClassification`].

    Args:
        backbone_config (`dict | PreTrainedConfig`, *optional*, defaults to a ResNet-50):
            Configuration of any `AutoBackbone` that yields spatial feature maps, `TimmBackboneConfig` included. A
            dictionary needs a `model_type`. It is copied, never changed in place.
        pooling (`str`, defaults to `"ca"`):
            What replaces the classifier's pooling: `"ca"`, the cross-attention stream, or `"source"`, the source's own
            readout. That is global average pooling, which has the name `"gap"`, too; or a CLS token or an attention
            pooling, where `"gap"` is refused, and `"ca"` adds what the stream pools of the patch tokens to what the
            source reads. Each call may override it: both live in one checkpoint.
        variant (`str`, defaults to `"stream"`):
            `"stream"` reads every depth, `"final"` the pooled feature map only.
        stream_layers (`list[str]`, *optional*):
            Where the stream reads, shallow to deep: names of backbone stages (`"stem"`, `"stage1"`, timm's `"layer1"`),
            dotted names of backbone submodules (`"encoder.stages.1.downsampling_layer"`), and `"neck"`, the output of
            `neck_layers`. The last one must be the pooled feature map. `None`: what `backbone_config.out_features`
            names if that is more than one stage, else all stages (`variant="stream"`); the pooled feature map
            (`variant="final"`). The model writes the list it used here.
        stream_channels (`list[int]`, *optional*):
            Number of channels at each of `stream_layers`. `None`: the model finds them, and writes them here.
        num_attention_heads (`int`, defaults to 1):
            Heads of every pooling; each d_l must be divisible by it.
        query (`str`, defaults to `"class_agnostic"`):
            `"class_agnostic"`: one query for all classes. `"class_specific"`: one query a class, each followed through
            the stream, and class c's logit read from its own token (the paper's ablation); one head only.
        output_projection (`bool`, defaults to `True`):
            Whether the last pooling is followed by its linear map W_L, as the inner ones always are.
        unit_keys (`bool`, defaults to `False`):
            Whether positions attend by the direction of their features alone, scores_l(p) = q_l . F_l(p) / ||F_l(p)||:
            a long vector then weighs no more than a short one.
        preserve_norm (`bool`, defaults to `False`):
            Whether the stream's pooled vector is rescaled to the length of the mean over positions, so that the stream
            says where to look and cannot make the classifier more confident by a longer vector.
        evidence_queries (`list[str]`, *optional*):
            Evidence blocks beside the stream: `"memory"`, which reads the classifier first and returns what the
            prediction rests on, and `"constant"`, which finds objects. `None`: no such block.
        evidence_depths (`int`, defaults to 2):
            Feature maps that the evidence blocks read: 1, the pooled one, or 2, the one before it, too, at whose
            resolution the map then is.
        evidence_layers (`list[str]`, *optional*):
            Names of these feature maps. `None`: the model finds them, and writes them here.
        evidence_channels (`list[int]`, *optional*):
            Number of channels at each of `evidence_layers`. `None`: the model finds them, and writes them here.
        init (`str`, defaults to `"gap"`):
            `"gap"`: queries and inner maps zero, W_L the identity, so that the untrained stream equals GAP; W_L zero
            where the source averages nothing, so that the untrained stream adds nothing to it.
            `"reference"`: q_0 ~ N(1, 1) and Xavier-uniform maps, as in the authors' code.
        freeze_backbone (`bool`, defaults to `True`):
            Keep backbone and neck in eval mode, also under `.train()`, and without gradient where the model is built or
            loaded; `requires_grad_` may give it back afterwards.
        freeze_classifier (`bool`, defaults to `False`):
            The same for the layers after the pooling.
        neck_layers (`list[dict]`, *optional*):
            Layers applied to the last feature map before pooling, e.g. EfficientNet's head convolution
            `[{"type": "conv", "out_channels": 1280}, {"type": "batch_norm", "eps": 1e-5}]`;
            the types are those of `build_layers`. `None`: what the backbone's own classifier has (Swin: a layer norm).
            `[]`: none.
        head_layers (`list[dict]`, *optional*):
            Layers between the pooled vector and the linear classifier. `None`: what the backbone's own classifier has
            (ConvNeXt: a layer norm). `[]`: none.
        classifier_cls_token (`bool`, defaults to `False`):
            Whether the classifier reads `[CLS token, pooled vector]` (DINOv2).
        whole_classifier (`bool`, defaults to `False`):
            Whether `backbone_config` is that of an image classifier which is used as it is, with its own layers between
            the pooled vector and the linear classifier, rather than as an `AutoBackbone`. For types of `HEADS` in
            `network_castream`; timm's networks (`TimmWrapperConfig`) always are.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: on a value outside the ones above, around a
            ValueError that names the argument, the value and what is allowed.

    Example:

    ```python
    >>> from transformers import ResNetConfig
    >>> from modeling_castream import CAStreamConfig, CAStreamForImageClassification

    >>> config = CAStreamConfig(backbone_config=ResNetConfig(), num_labels=10)
    >>> model = CAStreamForImageClassification(config)
    ```
    """

    model_type = "castream"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - the name and the kind are PreTrainedConfig's

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: str = "ca"
    variant: str = "stream"
    stream_layers: list[str] | None = None
    stream_channels: list[int] | None = None
    num_attention_heads: int = 1
    query: str = "class_agnostic"
    output_projection: bool = True
    unit_keys: bool = False
    preserve_norm: bool = False
    evidence_queries: list[str] | None = None
    evidence_depths: int = 2
    evidence_layers: list[str] | None = None
    evidence_channels: list[int] | None = None
    init: str = "gap"
    freeze_backbone: bool = True
    freeze_classifier: bool = False
    neck_layers: list[dict] | None = None
    head_layers: list[dict] | None = None
    classifier_cls_token: bool = False
    whole_classifier: bool = False

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = ResNetConfig()
        elif isinstance(self.backbone_config, dict):
            if "model_type" not in self.backbone_config:
                raise ValueError(
                    "backbone_config is a dictionary without 'model_type': add it, e.g. {'model_type': 'resnet', ...}."
                )
            own = self.backbone_config["model_type"] == TorchvisionConfig.model_type  # no type of transformers
            self.backbone_config = (TorchvisionConfig if own else AutoConfig.for_model)(**self.backbone_config)
        # The model narrows out_features to what the stream reads; the caller's object must not feel that.
        self.backbone_config = copy.deepcopy(self.backbone_config)
        super().__post_init__(**kwargs)
        for name, value in vars(self.backbone_config).items():
            if isinstance(value, tuple):  # as after a reload; ConvNeXt and FocalNet take no tuples, their own defaults
                setattr(self.backbone_config, name, list(value))
        family = self.backbone_config.model_type
        if self.neck_layers is None:
            self.neck_layers = self._resolve_eps(_FAMILY_NECK.get(family, []))
        if self.head_layers is None:
            self.head_layers = self._resolve_eps(_FAMILY_HEAD.get(family, []))
        if self.label2id is None and self.id2label is not None:
            self.label2id = {label: index for index, label in self.id2label.items()}
        # save_pretrained registers only the class being saved; the Hub's loader needs every entry.
        self.auto_map = {
            "AutoConfig": "configuration_castream.CAStreamConfig",
            "AutoModel": "modeling_castream.CAStreamModel",
            "AutoModelForImageClassification": "modeling_castream.CAStreamForImageClassification",
        }
        self.custom_pipelines = custom_pipelines()

    def to_dict(self) -> dict:
        """As JSON holds it. `pipeline()` puts classes into `custom_pipelines` when it loads one; names go out again."""
        return {**super().to_dict(), "custom_pipelines": custom_pipelines()}

    def _resolve_eps(self, layers: list[dict]) -> list[dict]:
        """Replace `eps_from`, the name of a backbone option, by that option's value."""
        return [{"type": layer["type"], "eps": getattr(self.backbone_config, layer["eps_from"])} for layer in layers]

    @property
    def source_readout(self) -> str:
        """What the source's classifier reads: `"average"`, `"token"` or `"attention"`, once the model is built."""
        return (getattr(self.backbone_config, "features", None) or {}).get("readout", "average")

    @property
    def source_pooling(self) -> str:
        """Name of the source's own readout: `"gap"` where it averages, else `"source"`."""
        return "gap" if self.source_readout == "average" else "source"

    @property
    def gradient_layer(self) -> str:
        """Where gradients for the pooled feature map are taken: there; or, where the source reads a CLS token, at the
        depth before it, the last block's input, as the patch tokens after the last block have none."""
        if self.source_readout != "token":
            return self.stream_layers[-1]
        return self.backbone_config.features["layers"][-2:][0]

    @property
    def feature_layers(self) -> list[str]:
        """Names of all feature maps that the model takes from its backbone: the stream's, and before them those that
        only the evidence blocks or gradients read."""
        others = dict.fromkeys([*(self.evidence_layers or []), self.gradient_layer])
        return [name for name in others if name not in self.stream_layers] + self.stream_layers

    def validate_architecture(self):
        """Check the fields against each other. Called by the constructor.

        Raises:
            ValueError: naming the argument, the value and the remedy.
        """
        super().validate_architecture()
        for name, allowed in (("pooling", POOLINGS), ("variant", VARIANTS), ("init", INITS), ("query", QUERIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}.")
        if self.query == "class_specific" and self.num_attention_heads != 1:
            raise ValueError(
                f"query='class_specific' works with num_attention_heads=1, got {self.num_attention_heads}."
            )
        unknown = [query for query in self.evidence_queries or [] if query not in EVIDENCE_QUERIES]
        if unknown:
            raise ValueError(f"evidence_queries must be out of {', '.join(EVIDENCE_QUERIES)}, got {unknown}.")
        if self.evidence_depths not in (1, 2):
            raise ValueError(f"evidence_depths must be 1 or 2, got {self.evidence_depths}.")
        if "memory" in (self.evidence_queries or []) and self.num_labels < 2:
            raise ValueError(
                f"evidence_queries=['memory'] compares the classifier's rows and needs at least two labels, got "
                f"{self.num_labels}: use ['constant']."
            )
        if self.query == "class_specific" and self.preserve_norm:
            raise ValueError("query='class_specific' works with preserve_norm=False, got True.")
        layers, channels = self.stream_layers, self.stream_channels
        if layers is not None and (not layers or len(set(layers)) != len(layers)):
            raise ValueError(f"stream_layers must name at least one layer and none twice, got {layers}.")
        if self.variant == "final" and layers is not None and len(layers) != 1:
            raise ValueError(f"variant='final' reads one layer, got stream_layers={layers}: use variant='stream'.")
        if channels is not None and (layers is None or len(channels) != len(layers)):
            raise ValueError(f"stream_channels needs one entry per stream_layers entry, got {channels} for {layers}.")


__all__ = ["CAStreamConfig"]
