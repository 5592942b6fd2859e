"""A pretrained classifier as a backbone: that very network, with its own head, whatever stands in it.

Of timm: the feature map is what `forward_features` returns. A head that averages gives back the one position that it
gets, so `forward_head` of a map of one position is what the network makes of a pooled vector. Of transformers: what
stands around the pooling differs by type, and `HEADS` says it. Only the last linear layer is taken out of the head: it
is the CA-Stream model's `classifier`.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

NECK = "neck"


class ClassifierNetwork:
    """What `TimmNetwork` and `TransformersNetwork` share: from what they compute to feature maps by name.

    `config.features` is what `describe_features` found out: `{"layout": "NCHW" | "NHWC" | "NLC", "layers": names}`.
    `inner_layers` are the indices of the depths to hand out beside the last.
    """

    num_prefix_tokens = 0
    captures_depths = False  # whether depths before the last are outputs of submodules of their names

    def feature_maps(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name, each (batch_size, num_channels, height, width), the pooled one last."""
        layers = self.config.features["layers"]
        features, maps = self(pixel_values)
        named = dict(zip([layers[index] for index in self.inner_layers], maps, strict=True))
        return named | {layers[-1]: self.to_map(features, pixel_values, self.config.features["layout"])}

    @torch.no_grad()
    def reads_pooled_vectors(self) -> bool:
        """Whether the classifier reads pooled vectors themselves: no norm, no activation, no layer is in between.

        Seen on two vectors, of lengths that differ, so that it does not matter how the network writes it down.
        """
        length = torch.tensor([[1.0], [100.0]])
        vectors = length * torch.randn(2, self.num_features, generator=torch.Generator().manual_seed(0))
        vectors = vectors.to(self.device, self.dtype)
        return torch.equal(self.readout(vectors), vectors)

    def to_map(self, features: torch.Tensor, pixel_values: torch.Tensor, layout: str) -> torch.Tensor:
        """Features in the network's layout as (batch_size, num_channels, height, width), without prefix tokens."""
        if layout == "NCHW":
            return features
        if layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self.num_prefix_tokens :]
        height, width = pixel_values.shape[-2:]
        rows = round(math.sqrt(tokens.shape[1] * height / width))
        return tokens.transpose(1, 2).unflatten(2, (rows, tokens.shape[1] // rows))


class TimmNetwork(ClassifierNetwork, PreTrainedModel):
    """A timm classifier without its last linear layer.

    Args:
        config: a TimmWrapperConfig: the network, by `architecture`, `model_args` and `pretrained_cfg`.
        num_labels: classes of the head.
    """

    def __init__(self, config: PreTrainedConfig, num_labels: int):
        super().__init__(config)
        import timm  # here, since other backbones do without it

        self.timm_model = timm.create_model(
            config.architecture,
            pretrained_cfg=getattr(config, "pretrained_cfg", None),
            **{**(config.model_args or {}), "num_classes": num_labels},
        )
        self.num_features = self._take_out_classifier(num_labels)
        self.inner_layers: list[int] = []
        self.post_init()

    def _take_out_classifier(self, num_labels: int) -> int | None:
        """Replace the last linear layer by nothing; its input's length, None where the head ends in something else."""
        name = self.timm_model.pretrained_cfg["classifier"]
        distilled = hasattr(self.timm_model, "head_dist")  # two heads, of which some of LeViT's name one
        layer = self.timm_model.get_submodule(name) if isinstance(name, str) and not distilled else None
        if type(layer) is not nn.Linear or layer.bias is None or layer.out_features != num_labels:
            return None
        self.timm_model.set_submodule(name, nn.Identity())
        return layer.in_features

    def _init_weights(self, module: nn.Module):
        """timm has initialised its weights; what a checkpoint does not hold, it makes anew."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(num_channels, height, width) of the images that the network is made for."""
        arguments, size = self.config.model_args or {}, self.timm_model.pretrained_cfg["input_size"][-2:]
        size = arguments.get("img_size") or size
        return arguments.get("in_chans", 3), *((size, size) if isinstance(size, int) else size)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head reads, in the network's own layout, and the maps of `inner_layers`, channels first."""
        if not self.inner_layers:
            return self.timm_model.forward_features(pixel_values), []
        last = len(self.config.features["layers"]) - 1  # else Hiera stops before it
        features, maps = self.timm_model.forward_intermediates(pixel_values, indices=[*self.inner_layers, last])
        return features, maps[:-1]

    @property
    def num_prefix_tokens(self) -> int:
        return getattr(self.timm_model, "num_prefix_tokens", 0)

    def readout(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the head makes of pooled vectors (..., num_channels): (..., num_features), or logits.

        Exact for heads that average: a mean over one position is that position.
        """
        vectors = pooled.reshape(-1, pooled.shape[-1])
        layout = self.config.features["layout"]
        if layout == "NCHW":
            features = vectors[:, :, None, None]
        elif layout == "NHWC":
            features = vectors[:, None, None, :]
        else:
            features = nn.functional.pad(vectors[:, None], (0, 0, self.num_prefix_tokens, 0))
        return self.timm_model.forward_head(features).reshape(*pooled.shape[:-1], -1)


@dataclass
class Head:
    """What a classifier of transformers puts around its pooling. All names are of submodules.

    Args:
        base: what yields `last_hidden_state`; None: the model's base model.
        prefix_tokens: tokens before the patches'.
        before: norm on the map before the pooling.
        after: layers on the pooled vector.
        classifiers: the last linear layer, or several whose logits are averaged.
    """

    base: str | None = None
    prefix_tokens: int = 0
    before: str | None = None
    after: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ("classifier",)


# By type, or by class where one of a type's classes differs.
HEADS = {
    "beit": Head(prefix_tokens=1, after=("beit.pooler.layernorm",)),
    "clip": Head(base="vision_model", prefix_tokens=1),
    "data2vec-vision": Head(prefix_tokens=1, after=("data2vec_vision.pooler.layernorm",)),
    "donut-swin": Head(),
    "efficientnet": Head(),
    "focalnet": Head(),
    "hiera": Head(after=("hiera.pooler.layernorm",)),
    "ijepa": Head(),
    "levit": Head(after=("classifier.batch_norm",), classifiers=("classifier.linear",)),
    "LevitForImageClassificationWithTeacher": Head(classifiers=("classifier", "classifier_distill")),
    "metaclip_2": Head(base="vision_model", prefix_tokens=1),
    "mobilenet_v1": Head(),
    "mobilenet_v2": Head(),
    "mobilevit": Head(),
    "mobilevitv2": Head(),
    "poolformer": Head(before="norm"),
    "pvt_v2": Head(),
    "regnet": Head(classifiers=("classifier.1",)),
    "segformer": Head(),
    "siglip": Head(base="vision_model"),
    "swiftformer": Head(before="norm", classifiers=("head", "dist_head")),
    "swinv2": Head(),
    "textnet": Head(classifiers=("fc",)),
}


def head_of(config: PreTrainedConfig) -> Head:
    """What a classifier of transformers has around its pooling."""
    return HEADS.get((config.architectures or [None])[0]) or HEADS[config.model_type]


class TransformersNetwork(ClassifierNetwork, nn.Module):
    """A classifier of transformers without its last linear layer.

    Args:
        config: of one of the types of `HEADS`.
        num_labels: classes of the head.
    """

    def __init__(self, config: PreTrainedConfig, num_labels: int):
        super().__init__()
        self.config, self.inner_layers = config, []
        own = copy.deepcopy(config)
        own.num_labels = num_labels
        self.network = AutoModelForImageClassification.from_config(own)
        self.head = head_of(config)
        self.num_prefix_tokens = self.head.prefix_tokens
        self.num_features = None
        if len(self.head.classifiers) == 1:
            [name] = self.head.classifiers
            self.num_features = self.network.get_submodule(name).in_features
            self.network.set_submodule(name, nn.Identity())

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(num_channels, height, width) of the images that the network is made for."""
        config = getattr(self.config, "vision_config", self.config)
        size = getattr(config, "image_size", None) or 224
        return getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is pooled, in the network's own layout, and the maps of `inner_layers`, channels first."""
        features, maps = self.all_depths(pixel_values, bool(self.inner_layers))
        return features, [maps[index] for index in self.inner_layers]

    def all_depths(self, pixel_values: torch.Tensor, inner: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is pooled, in the network's own layout, and the maps of all depths before it if `inner`."""
        base = self.network.get_submodule(self.head.base) if self.head.base else self.network.base_model
        output = base(pixel_values, output_hidden_states=inner, return_dict=True)
        features = output.last_hidden_state
        if self.head.before:
            features = self.network.get_submodule(self.head.before)(features)
        depths = (output.hidden_states or ())[:-1] if inner else ()
        return features, [self.to_map(one, pixel_values, "NCHW" if one.ndim == 4 else "NLC") for one in depths]

    def readout(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the head makes of pooled vectors (..., num_channels): (..., num_features), or logits."""
        vectors = pooled.reshape(-1, pooled.shape[-1])
        for name in self.head.after:
            vectors = self.network.get_submodule(name)(vectors)
        if len(self.head.classifiers) > 1:
            vectors = sum(self.network.get_submodule(name)(vectors) for name in self.head.classifiers)
            vectors = vectors / len(self.head.classifiers)
        return vectors.reshape(*pooled.shape[:-1], -1)


def build_network(config: PreTrainedConfig, num_labels: int) -> ClassifierNetwork:
    """The network of a config of timm's wrapper, of torchvision, or of one of the types of `HEADS`."""
    if config.model_type == "torchvision":
        from .torchvision_castream import TorchvisionNetwork  # here, since it builds on this file

        return TorchvisionNetwork(config, num_labels)
    return (TimmNetwork if config.model_type == "timm_wrapper" else TransformersNetwork)(config, num_labels)


def describe_features(config: PreTrainedConfig, num_labels: int) -> list[int]:
    """Find the layout of a network's feature map and the names of its depths, and write them into `config.features`.

    A forward pass on the meta device, which has shapes and no data, tells them. timm's depths are those of its
    `feature_info`, transformers' its hidden states; the last is the map that the head reads, `"neck"` where layers of
    other width follow the last stage.

    Returns:
        Number of channels at each depth.

    Raises:
        ValueError: on a network that does not return one map, or does not hand out its depths.
    """
    with torch.device("meta"):
        network = build_network(config, num_labels).eval().to("meta")
        pixel_values = torch.empty(1, *network.image_shape)
    if network.captures_depths:
        channels = network.depths(pixel_values)
        config.features = {"layout": "NCHW", "layers": list(channels)}
        return list(channels.values())
    model = getattr(network, "timm_model", None)
    if model is None:
        features, maps = network.all_depths(pixel_values)
        names = [f"stage{index}" for index in range(len(maps) + 1)]
    elif not hasattr(model, "forward_intermediates"):
        raise ValueError(f"backbone_config: timm's {config.architecture} does not hand out its feature maps.")
    else:
        features, maps = model.forward_intermediates(pixel_values)
        names = [entry["module"] for entry in getattr(model, "feature_info", [])]
        if len(names) != len(maps) or len(set(names)) != len(names) or "" in names:
            names = [f"stage{index}" for index in range(len(maps))]
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"backbone_config: {config.model_type} ends in {found}, not in one feature map.")
    layout = "NLC" if features.ndim == 3 else getattr(model, "output_fmt", "NCHW")
    if features.ndim == 4 and maps and features.movedim(-1, 1).shape == maps[-1].shape:  # HieraDet does not say it
        layout = "NHWC"
    num_channels = features.shape[1 if layout == "NCHW" else -1]
    if model is not None and num_channels != maps.pop().shape[1]:
        names[-1] = NECK
    config.features = {"layout": layout, "layers": names}
    return [*(one.shape[1] for one in maps), num_channels]


__all__ = ["ClassifierNetwork", "TimmNetwork", "TransformersNetwork", "build_network", "describe_features"]
