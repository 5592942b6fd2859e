"""A pretrained classifier as a backbone: that very network, with its own head, whatever stands in it.

Of timm: the feature map is what `forward_features` returns. A head that averages gives back the one position that it
gets, so `forward_head` of a map of one position is what the network makes of a pooled vector. Of transformers: what
stands around the pooling differs by type, and `HEADS` says it. Only the last linear layer is taken out of the head: it
is the CA-Stream model's `classifier`.

Where the source averages nothing but reads a CLS token, or what an attention pooling returns, that vector is handed out
beside the feature map of patch tokens, and a pooled vector is added to it before the head reads the sum.
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

    `config.features` is what `describe_features` found out: `{"layout": "NCHW" | "NHWC" | "NLC", "layers": names}`,
    and `"readout"` where that is not `"average"`. `inner_layers` are the indices of the depths to hand out beside the
    last.
    """

    num_prefix_tokens = 0
    captures_depths = False  # whether depths before the last are outputs of submodules of their names
    source_readout = "average"  # or "token", "attention": what the source's head reads
    num_read_tokens = 1  # two with a distillation token

    def feature_maps(self, pixel_values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Feature maps by name, each (batch_size, num_channels, height, width), the pooled one last; and what the
        source's head reads instead of their average, None where it averages."""
        layers = self.config.features["layers"]
        features, maps = self(pixel_values)
        named = dict(zip([layers[index] for index in self.inner_layers], maps, strict=True))
        named[layers[-1]] = self.to_map(features, pixel_values, self.config.features["layout"])
        return named, None if self.source_readout == "average" else self.read_tokens(features)

    def read_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """The CLS token (batch_size, num_channels) of tokens; with a distillation token (batch_size, 2, num_channels),
        as its head reads both."""
        return features[:, : self.num_read_tokens].squeeze(1)

    def add_to_tokens(self, pooled: torch.Tensor, cls_token: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (batch_size, [num_labels,] num_channels), each added to the tokens of its image that the
        source's head reads: (batch_size [* num_labels], num_read_tokens, num_channels)."""
        tokens = cls_token if cls_token.ndim == 3 else cls_token[:, None]
        tokens = tokens[:, None] if pooled.ndim == 3 else tokens
        return (tokens + pooled[..., None, :]).flatten(0, -3)

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
        if tokens.shape[1] % rows:  # an early stage, to which the tokens before the patches' are not added yet
            tokens, rows = features, round(math.sqrt(features.shape[1] * height / width))
        return tokens.transpose(1, 2).unflatten(2, (rows, tokens.shape[1] // rows))


_READOUTS = {"token": "token", "map": "attention"}  # of timm's names of poolings


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
        self.neck = self._take_out_neck()
        self.source_readout = _READOUTS.get(getattr(self.timm_model, "global_pool", None), "average")
        self.attention_pool = None
        if self.source_readout == "attention":  # out of the head, which then reads its result as it reads a CLS token
            self.attention_pool, self.timm_model.attn_pool = self.timm_model.attn_pool, None
            self.timm_model.global_pool = "token"
        elif isinstance(self.timm_model.pretrained_cfg["classifier"], tuple | list):
            self.num_read_tokens = len(self.timm_model.pretrained_cfg["classifier"])
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

    def _take_out_neck(self) -> nn.Module:
        """Replace by nothing the layers of a head that it runs on every position before it pools: those of EfficientViT
        (MIT), CPUBone and LowFormer."""
        for owner in (self.timm_model, getattr(self.timm_model, "head", None)):
            if isinstance(neck := getattr(owner, "in_conv", None), nn.Module):
                owner.in_conv = nn.Identity()
                return neck
        return nn.Identity()

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
            return self.neck(self.timm_model.forward_features(pixel_values)), []
        last = len(self.config.features["layers"]) - 1  # else Hiera stops before it
        features, maps = self.timm_model.forward_intermediates(pixel_values, indices=[*self.inner_layers, last])
        return self.neck(features), maps[:-1]

    @property
    def num_prefix_tokens(self) -> int:
        return getattr(self.timm_model, "num_prefix_tokens", int(self.source_readout == "token"))

    def read_tokens(self, features: torch.Tensor) -> torch.Tensor:
        if self.attention_pool is None:
            return super().read_tokens(features)
        start = 0 if getattr(self.timm_model, "pool_include_prefix", True) else self.num_prefix_tokens
        return self.attention_pool(features[:, start:])

    def readout(self, pooled: torch.Tensor, cls_token: torch.Tensor | None = None) -> torch.Tensor:
        """What the head makes of pooled vectors (..., num_channels): (..., num_features), or logits.

        Exact for heads that average: a mean over one position is that position. A head that does not gets the pooled
        vectors added to `cls_token`.
        """
        vectors = pooled.reshape(-1, pooled.shape[-1])
        layout = self.config.features["layout"]
        if cls_token is not None:
            features = self.add_to_tokens(pooled, cls_token)
        elif layout == "NCHW":
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
        after: layers on the pooled vector, or on each token that is read.
        classifiers: the last linear layer, or several whose logits are averaged.
        reads_token: whether the classifier reads the first token, and a second one the second, instead of an average.
        other_states: hidden states at the end that are the last block's.
        takes_patches: whether the network reads lists of patches, of images of any size.
    """

    base: str | None = None
    prefix_tokens: int = 0
    before: str | None = None
    after: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ("classifier",)
    reads_token: bool = False
    other_states: int = 1
    takes_patches: bool = False


# By type, or by class where one of a type's classes differs.
HEADS = {
    "beit": Head(prefix_tokens=1, after=("beit.pooler.layernorm",)),
    "clip": Head(base="vision_model", prefix_tokens=1),
    "cvt": Head(prefix_tokens=1, after=("layernorm",), reads_token=True),
    "data2vec-vision": Head(prefix_tokens=1, after=("data2vec_vision.pooler.layernorm",)),
    "deit": Head(prefix_tokens=2, reads_token=True),
    "DeiTForImageClassificationWithTeacher": Head(
        prefix_tokens=2, classifiers=("cls_classifier", "distillation_classifier"), reads_token=True
    ),
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
    "pvt": Head(prefix_tokens=1, reads_token=True, other_states=2),
    "pvt_v2": Head(),
    "regnet": Head(classifiers=("classifier.1",)),
    "segformer": Head(),
    "siglip": Head(base="vision_model"),
    "siglip2": Head(base="vision_model", takes_patches=True),
    "swiftformer": Head(before="norm", classifiers=("head", "dist_head")),
    "swinv2": Head(),
    "textnet": Head(classifiers=("fc",)),
    "vit": Head(prefix_tokens=1, reads_token=True),
    "vit_msn": Head(prefix_tokens=1, reads_token=True),
}


def head_of(config: PreTrainedConfig) -> Head:
    """What a classifier of transformers has around its pooling."""
    if not getattr(config, "use_mean_pooling", True):  # of BEiT and its relatives
        return Head(prefix_tokens=1, reads_token=True)
    return HEADS.get((config.architectures or [None])[0]) or HEADS[config.model_type]


def network_arguments(config: PreTrainedConfig, pixel_values: torch.Tensor) -> tuple:
    """What a classifier of transformers takes, in its order, for images.

    Args:
        config: of one of the types of `HEADS`.
        pixel_values: (batch_size, num_channels, height, width).

    Returns:
        The images; or their patches (batch_size, num_patches, patch_size * patch_size * num_channels) row by row, no
        mask, since no patch is padding, and the one (num_rows, num_columns) of all images.

    Raises:
        ValueError: on images that can't be cut into patches.
    """
    if not head_of(config).takes_patches:
        return (pixel_values,)
    size, (height, width) = config.vision_config.patch_size, pixel_values.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"pixel_values: height and width must be multiples of {size}, got {height} x {width}.")
    patches = pixel_values.unflatten(3, (width // size, size)).unflatten(2, (height // size, size))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    # on the CPU, since networks look at these numbers
    return patches, None, torch.tensor([[height // size, width // size]], device="cpu")


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
        self.source_readout = "token" if self.head.reads_token else "average"
        self.num_features = None
        self.num_read_tokens = len(self.head.classifiers)
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
        if self.head.takes_patches:
            size = math.isqrt(config.num_patches) * config.patch_size
        return getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is pooled, in the network's own layout, and the maps of `inner_layers`, channels first."""
        features, maps = self.all_depths(pixel_values, bool(self.inner_layers))
        return features, [maps[index] for index in self.inner_layers]

    def all_depths(self, pixel_values: torch.Tensor, inner: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is pooled, in the network's own layout, and the maps of all depths before it if `inner`."""
        base = self.network.get_submodule(self.head.base) if self.head.base else self.network.base_model
        arguments = network_arguments(self.config, pixel_values)
        output = base(*arguments, output_hidden_states=inner, return_dict=True)
        features = output.last_hidden_state
        if (cls_token := getattr(output, "cls_token_value", None)) is not None:  # CvT's, apart from its map
            features = torch.cat([cls_token, features.flatten(2).transpose(1, 2)], dim=1)
        if self.head.before:
            features = self.network.get_submodule(self.head.before)(features)
        depths = (output.hidden_states or ())[: -self.head.other_states] if inner else ()
        return features, [self.to_map(one, pixel_values, "NCHW" if one.ndim == 4 else "NLC") for one in depths]

    def readout(self, pooled: torch.Tensor, cls_token: torch.Tensor | None = None) -> torch.Tensor:
        """What the head makes of pooled vectors (..., num_channels): (..., num_features), or logits.

        A head that does not average gets them added to `cls_token`.
        """
        names = self.head.classifiers
        if cls_token is None:
            read = [pooled.reshape(-1, pooled.shape[-1])] * len(names)
        else:
            read = self.add_to_tokens(pooled, cls_token).unbind(1)
        for name in self.head.after:
            read = [self.network.get_submodule(name)(one) for one in read]
        vectors = read[0]
        if len(names) > 1:
            logits = [self.network.get_submodule(name)(one) for name, one in zip(names, read, strict=True)]
            vectors = sum(logits) / len(names)
        return vectors.reshape(*pooled.shape[:-1], -1)


def build_network(config: PreTrainedConfig, num_labels: int) -> ClassifierNetwork:
    """The network of a config of timm's wrapper, of torchvision, or of one of the types of `HEADS`."""
    if config.model_type == "torchvision":
        from .torchvision_castream import TorchvisionNetwork  # here, since it builds on this file

        return TorchvisionNetwork(config, num_labels)
    return (TimmNetwork if config.model_type == "timm_wrapper" else TransformersNetwork)(config, num_labels)


def describe_features(config: PreTrainedConfig, num_labels: int) -> list[int]:
    """Find the layout of a network's feature map and the names of its depths, and write them into `config.features`.

    A forward pass on the meta device, which has shapes and no data, tells them; where a network looks at data on its
    way, one on the CPU. timm's depths are those of its `feature_info`, transformers' its hidden states; the last is the
    map that the head reads, `"neck"` where layers of other width follow the last stage.

    Returns:
        Number of channels at each depth.

    Raises:
        ValueError: on a network that does not return one map, or does not hand out its depths.
    """
    try:
        return _describe_features(config, num_labels, "meta")
    except RuntimeError:
        return _describe_features(config, num_labels, "cpu")


@torch.no_grad()
def _describe_features(config: PreTrainedConfig, num_labels: int, device: str) -> list[int]:
    with torch.device(device):
        network = build_network(config, num_labels).eval().to(device)
        pixel_values = torch.zeros(1, *network.image_shape)
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
        features = network.neck(features)
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
    if network.source_readout != "average":
        config.features["readout"] = network.source_readout
    return [*(one.shape[1] for one in maps), num_channels]


__all__ = [
    "ClassifierNetwork",
    "TimmNetwork",
    "TransformersNetwork",
    "build_network",
    "describe_features",
    "network_arguments",
]
