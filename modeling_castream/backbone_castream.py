"""What lies between an image and the stream: the frozen backbone and the feature maps the stream reads.

A whole classifier is a backbone as it is (`network_castream`). `AutoBackbone` returns stage outputs. Three things stand
between those and the maps a pretrained classifier really pools, and all three are settled here: norms that the backbone
class adds and the classifier does not have, layers that the classifier has and the backbone class leaves out (the
neck), and places inside a stage that a stream may want to read.
"""

from functools import partial

import torch
from torch import nn
from transformers import AutoBackbone
from transformers.activations import ACT2CLS, ACT2FN
from transformers.utils.output_capturing import CompileableContextVar

from .network_castream import NECK, ClassifierNetwork, build_network, describe_features

# Thread-safe store of the submodule outputs of the forward pass under way; None outside of one.
_captured = CompileableContextVar("castream_captured_features")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a (batch_size, num_channels, height, width) map."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels last and back


def build_layers(specs: list[dict], num_channels: int, spatial: bool, name: str) -> tuple[nn.Sequential, int]:
    """Build a classifier's layers around the pooling from their description.

    Args:
        specs: one dictionary a layer: `{"type": "conv" | "linear", "out_channels": int, "bias": bool}`,
            `{"type": "batch_norm" | "layer_norm", "eps": float}`,
            `{"type": "group_norm", "num_groups": int, "eps": float}` or
            `{"type": "activation", "function": name in transformers' ACT2FN}`.
        num_channels: channels of the input.
        spatial: whether the input is (batch_size, num_channels, height, width) or (batch_size, num_channels).
        name: the config's field, for messages.

    Returns:
        The layers and the number of channels they end with.

    Raises:
        ValueError: on an unknown layer type or option.
    """
    layers = []
    for spec in specs:
        options = dict(spec)
        kind = options.pop("type", None)
        if kind in ("conv", "linear"):
            out_channels, bias = options.pop("out_channels"), options.pop("bias", False)
            layer = (
                nn.Conv2d(num_channels, out_channels, 1, bias=bias)
                if spatial
                else nn.Linear(num_channels, out_channels, bias=bias)
            )
            num_channels = out_channels
        elif kind == "batch_norm":
            layer = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(num_channels, eps=options.pop("eps", 1e-5))
        elif kind == "layer_norm":
            layer = (LayerNorm2d if spatial else nn.LayerNorm)(num_channels, eps=options.pop("eps", 1e-6))
        elif kind == "group_norm":
            layer = nn.GroupNorm(options.pop("num_groups"), num_channels, eps=options.pop("eps", 1e-5))
        elif kind == "activation" and options.get("function") in ACT2CLS:
            layer = ACT2FN[options.pop("function")]
        else:
            raise ValueError(f"{name} has an unknown layer {spec}: see build_layers for the types and functions.")
        if options:
            raise ValueError(f"{name} has unknown options {sorted(options)} in layer {spec}.")
        layers.append(layer)
    return nn.Sequential(*layers), num_channels


def _capture(name: str, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
    captured = _captured.get()
    if captured is not None:
        captured[name] = output[0] if isinstance(output, tuple) else output


def _stage_config(backbone_config):
    """The config that holds a backbone's stages: in an image-and-text model's (TIPSv2), that of its image side."""
    return getattr(backbone_config, "vision_config", backbone_config)


def _stage_names(backbone_config) -> list[str]:
    """Names of all stages of a backbone, shallow to deep."""
    if backbone_config.model_type != "timm_backbone":
        return list(_stage_config(backbone_config).stage_names)
    import timm  # timm knows a network's stages only once it is built

    with torch.device("meta"):
        info = timm.create_model(backbone_config.backbone, features_only=True).feature_info
    return [stage["module"] for stage in info.info]


def is_whole_classifier(config) -> bool:
    """Whether the backbone of a CAStreamConfig is a pretrained classifier as it is, with its own head."""
    return config.whole_classifier or config.backbone_config.model_type in ("timm_wrapper", "torchvision")


def _resolve_network_layers(config) -> list[str]:
    """`resolve_stream_layers` of a whole classifier; also writes `config.stream_channels` where these are depths."""
    network, layers = config.backbone_config, config.stream_layers
    channels = None if getattr(network, "features", None) else describe_features(network, config.num_labels)
    names = network.features["layers"]
    if layers is None:
        layers = names[-1:] if config.variant == "final" else names
    elif layers[-1] != names[-1]:
        raise ValueError(f"stream_layers must end with the pooled feature map {names[-1]!r}, got {layers}.")
    config.stream_layers = list(layers)
    _resolve_evidence_layers(config, names)
    if config.stream_channels is None and channels and set(layers) <= set(names):
        config.stream_channels = [channels[names.index(name)] for name in layers]
    return [name for name in names if name in config.feature_layers]


def _resolve_evidence_layers(config, stages: list[str]) -> None:
    """Write `config.evidence_layers`: the pooled feature map and, for two depths, the stage before the last."""
    if config.evidence_queries and config.evidence_layers is None:
        finer = stages[-2:-1] if config.evidence_depths == 2 else []
        config.evidence_layers = [*finer, config.stream_layers[-1]]


def resolve_stream_layers(config) -> list[str]:
    """Settle which layers the stream reads, and narrow `backbone_config` to the stages that this takes.

    Writes `config.stream_layers` and the backbone's `out_features` (`out_indices` for timm).

    Returns:
        Names of the stages the backbone has to return, shallow to deep; the last one feeds the pooling (or the neck).

    Raises:
        ValueError: where the last of `config.stream_layers` is not the pooled feature map.
    """
    if is_whole_classifier(config):
        return _resolve_network_layers(config)
    backbone_config, layers = _stage_config(config.backbone_config), config.stream_layers
    is_timm = backbone_config.model_type == "timm_backbone"
    names = _stage_names(backbone_config)
    if layers is None:
        stages = [names[index] for index in backbone_config.out_indices]
        if config.variant == "final":
            stages = stages[-1:]
        elif len(stages) == 1:
            stages = names
        layers = [*stages[:-1], NECK if config.neck_layers else stages[-1]]
    else:
        stages = [name for name in names if name in layers or (name == names[-1] and layers[-1] == NECK)]
    pooled = NECK if config.neck_layers else (stages[-1] if stages else names[-1])
    if layers[-1] != pooled:
        raise ValueError(f"stream_layers must end with the pooled feature map {pooled!r}, got {layers}.")
    config.stream_layers = layers
    _resolve_evidence_layers(config, names)
    stages = [name for name in names if name in (*stages, *config.feature_layers)]
    if is_timm:
        backbone_config.out_indices = [names.index(name) for name in stages]
    else:
        backbone_config.out_features = stages
    return stages


def build_backbone(config) -> nn.Module:
    """Build the backbone of a CAStreamConfig, behaving as the backbone of its family's classifier does.

    Writes `config.stream_layers`.

    Raises:
        ValueError: on a stream layer that the backbone does not have.
    """
    stages = resolve_stream_layers(config)
    if is_whole_classifier(config):
        names = config.backbone_config.features["layers"]
        backbone = build_network(config.backbone_config, config.num_labels)
        if backbone.captures_depths:
            names = names[-1:]
        backbone.inner_layers = [names.index(name) for name in stages[:-1] if name in names]
        _capture_submodules(backbone, next(backbone.children()), config.feature_layers, names)
        return backbone
    backbone = AutoBackbone.from_config(config.backbone_config)
    norms = getattr(backbone, "hidden_states_norms", nn.ModuleDict())  # an AutoBackbone's addition, untrained
    for name, _ in list(norms.named_children()):
        norms.add_module(name, nn.Identity())
    if config.backbone_config.model_type == "swin":
        _match_swin_windows(backbone)
    _capture_submodules(backbone, backbone, config.feature_layers, [*stages, NECK])
    return backbone


def _capture_submodules(backbone: nn.Module, root: nn.Module, layers: list[str], stages: list[str]) -> None:
    """Have the outputs of the submodules of `root` captured that `layers` names beside `stages`."""
    for name in layers:
        if name in stages:
            continue
        try:
            module = root.get_submodule(name)
        except AttributeError:
            known = ", ".join(getattr(backbone, "stage_names", stages))
            raise ValueError(
                f"stream_layers names {name!r}, which is neither a stage ({known}) nor a submodule of "
                f"{type(root).__name__}."
            ) from None
        while isinstance(module, nn.ModuleList):  # such a list runs item by item: what comes out is its last one's
            module = module[-1]
        module.register_forward_hook(partial(_capture, name))


def _match_swin_windows(backbone: nn.Module) -> None:
    """Unshift the windows of stages no larger than one window, as Swin's classifier does and SwinBackbone does not."""
    for layer in backbone.swin.encoder.layers:
        for block in layer.blocks:
            if min(block.input_resolution) <= block.window_size:
                block.shift_size = 0


def feature_channels(config) -> dict[str, int]:
    """Find the number of channels of every feature map that a CAStreamConfig takes from its backbone.

    What a backbone says of itself (`num_features`) is not always what it returns (FocalNet, UVDoc), and of its
    submodules it says nothing. A forward pass on the meta device, which has shapes and no data, settles both.

    Returns:
        Channels by name of stage or submodule.

    Raises:
        ValueError: on a backbone that cannot run on its own image size, or yields something else than spatial maps.
    """
    with torch.device("meta"):
        backbone = build_backbone(config).eval().to("meta")  # what a constructor made elsewhere, too
    shape = (1, num_input_channels(config), *_image_size(backbone))
    try:
        feature_maps, _ = run_backbone(backbone, torch.empty(shape, dtype=backbone.dtype, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"backbone_config: {type(backbone).__name__} does not run on pixel_values of shape {shape}: {error}"
        ) from error
    for name, feature_map in feature_maps.items():
        if feature_map.ndim != 4:
            raise ValueError(
                f"stream_layers: {name!r} of {type(backbone).__name__} has the shape {tuple(feature_map.shape)}; "
                "the stream reads maps of shape (batch_size, num_channels, height, width)."
            )
    return {name: feature_map.shape[1] for name, feature_map in feature_maps.items()}


def num_input_channels(config) -> int:
    """Channels of the images that the backbone of a CAStreamConfig reads."""
    backbone_config = config.backbone_config
    if backbone_config.model_type == "timm_wrapper":
        return (backbone_config.model_args or {}).get("in_chans", 3)
    return getattr(_stage_config(backbone_config), "num_channels", 3)


def _image_size(backbone: nn.Module) -> tuple[int, int]:
    """Height and width that a backbone is made for, 224 where it takes any."""
    if isinstance(backbone, ClassifierNetwork):
        return backbone.image_shape[1:]
    if backbone.config.model_type == "timm_backbone":
        return tuple(backbone._backbone.default_cfg["input_size"][-2:])
    size = getattr(backbone.config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else tuple(size)


def run_backbone(
    backbone: nn.Module, pixel_values: torch.Tensor, output_hidden_states: bool = False
) -> tuple[dict[str, torch.Tensor], object]:
    """Run a backbone that `build_backbone` made.

    Args:
        pixel_values: (batch_size, num_channels, height, width), normalised.
        output_hidden_states: whether the backbone returns its own hidden states, whatever its config says.

    Returns:
        The feature maps of its stages and captured submodules by name, channels first; and the backbone's own output,
        of a whole classifier what its head reads instead of an average.
    """
    captured = {}
    token = _captured.set(captured)
    try:
        if isinstance(backbone, ClassifierNetwork):
            feature_maps, output = backbone.feature_maps(pixel_values)
        else:
            output = backbone(pixel_values, output_hidden_states=output_hidden_states)
            feature_maps = dict(zip(backbone.out_features, output.feature_maps, strict=True))
    finally:
        _captured.reset(token)
    if is_channels_last(backbone):
        captured = {name: feature_map.permute(0, 3, 1, 2) for name, feature_map in captured.items()}
        if not isinstance(backbone, ClassifierNetwork):
            feature_maps = {name: feature_map.permute(0, 3, 1, 2) for name, feature_map in feature_maps.items()}
    return feature_maps | captured, output


def read_feature_maps(
    backbone: nn.Module, neck: nn.Module, config, pixel_values: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Run backbone and neck.

    Args:
        pixel_values: (batch_size, num_channels, height, width), normalised.

    Returns:
        The feature maps named by `config.feature_layers`, each (batch_size, num_channels_l, height_l, width_l), the
        pooled one last; and the CLS token (batch_size, hidden_size) where the classifier reads it, else None.
    """
    feature_maps, output = run_backbone(backbone, pixel_values, output_hidden_states=config.classifier_cls_token)
    if isinstance(backbone, ClassifierNetwork):
        cls_token = output
    else:
        feature_maps[NECK] = neck(feature_maps[backbone.out_features[-1]])
        cls_token = backbone.layernorm(output.hidden_states[-1])[:, 0] if config.classifier_cls_token else None
    return tuple(feature_maps[name] for name in config.feature_layers), cls_token


def is_channels_last(backbone: nn.Module) -> bool:
    """Whether a backbone yields (batch_size, height, width, num_channels): timm's Swin and its relatives."""
    network = getattr(backbone, "_backbone", None) or getattr(backbone, "timm_model", None) or backbone
    return getattr(network, "output_fmt", "NCHW") == "NHWC"
