"""A timm classifier as a backbone: that very network, with its own head, whatever stands in it.

The feature map is what `forward_features` returns. A head that averages gives back the one position that it gets, so
`forward_head` of a map of one position is what the network makes of a pooled vector. Only the last linear layer is
taken out of the head: it is the CA-Stream model's `classifier`.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig

NECK = "neck"


class TimmNetwork(PreTrainedModel):
    """A timm classifier without its last linear layer.

    Args:
        config: the network, by `architecture`, `model_args` and `pretrained_cfg`. `features` in it is what
            `describe_features` found out: `{"layout": "NCHW" | "NHWC" | "NLC", "layers": names of the feature maps}`.
        num_labels: classes of the head.
    """

    config: TimmWrapperConfig
    config_class = TimmWrapperConfig

    def __init__(self, config: TimmWrapperConfig, num_labels: int):
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
        layer = self.timm_model.get_submodule(name) if isinstance(name, str) else None
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
        return self.timm_model.forward_intermediates(pixel_values, indices=self.inner_layers)

    def feature_maps(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name, each (batch_size, num_channels, height, width), the pooled one last."""
        layers = self.config.features["layers"]
        features, maps = self(pixel_values)
        named = dict(zip([layers[index] for index in self.inner_layers], maps, strict=True))
        return named | {layers[-1]: self._to_map(features, pixel_values)}

    def _to_map(self, features: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        layout = self.config.features["layout"]
        if layout == "NCHW":
            return features
        if layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self._num_prefix_tokens :]
        height, width = pixel_values.shape[-2:]
        rows = round(math.sqrt(tokens.shape[1] * height / width))
        return tokens.transpose(1, 2).unflatten(2, (rows, tokens.shape[1] // rows))

    @property
    def _num_prefix_tokens(self) -> int:
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
            features = nn.functional.pad(vectors[:, None], (0, 0, self._num_prefix_tokens, 0))
        return self.timm_model.forward_head(features).reshape(*pooled.shape[:-1], -1)


def describe_features(config: TimmWrapperConfig, num_labels: int) -> list[int]:
    """Find the layout of a network's feature map and the names of its depths, and write them into `config.features`.

    A forward pass on the meta device, which has shapes and no data, tells them. The depths are those of timm's
    `feature_info`; the last is the map that the head reads, `"neck"` where layers of other width follow the last stage.

    Returns:
        Number of channels at each depth.

    Raises:
        ValueError: on a network that does not return one map, or does not hand out its depths.
    """
    with torch.device("meta"):
        network = TimmNetwork(config, num_labels).eval().to("meta")
        pixel_values = torch.empty(1, *network.image_shape)
    model = network.timm_model
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"backbone_config: timm's {config.architecture} does not hand out its feature maps.")
    features, maps = model.forward_intermediates(pixel_values)
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"backbone_config: timm's {config.architecture} ends in {found}, not in one feature map.")
    layout = "NLC" if features.ndim == 3 else getattr(model, "output_fmt", "NCHW")
    names = [entry["module"] for entry in getattr(model, "feature_info", [])]
    if len(names) != len(maps) or len(set(names)) != len(names) or "" in names:
        names = [f"stage{index}" for index in range(len(maps))]
    num_channels = features.shape[1 if layout == "NCHW" else -1]
    if num_channels != maps[-1].shape[1]:
        names[-1] = NECK
    config.features = {"layout": layout, "layers": names}
    return [*(one.shape[1] for one in maps[:-1]), num_channels]


__all__ = ["TimmNetwork", "describe_features"]
