"""A torchvision classifier as a backbone: that very network, cut in two at its pooling.

torchvision's networks have no method that stops at the last feature map. Their outermost `forward` is traced, which
leaves every layer in it whole, and the one node that averages positions is where it is cut: what comes before makes the
pooled map, what comes after is the head, for which an average over one position is that position.
"""

import torch
from torch import fx, nn

from .configuration_castream import TorchvisionConfig
from .network_castream import NECK, ClassifierNetwork


class _OutermostTracer(fx.Tracer):
    """Traces a network's own forward and, since MaxViT pools in there, sequences with a pooling."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not (isinstance(module, nn.Sequential) and any(isinstance(one, nn.AdaptiveAvgPool2d) for one in module))


def _averages(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node is the mean over all positions of a map."""
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.op == "call_function" and node.target is nn.functional.adaptive_avg_pool2d:
        return node.args[1] in (1, (1, 1))
    return node.op == "call_method" and node.target == "mean" and node.args[1:] == ([2, 3],)


def _what_it_does(network: nn.Module, graph: fx.Graph) -> str:
    """What a network without global average pooling of features does in its place."""
    if any(_averages(node, network) for node in graph.nodes):
        return "it averages scores of classes, which a convolution and an activation make at every position"
    if hasattr(network, "class_token"):
        return "its classifier reads the CLS token"
    return "its classifier reads every position of the last feature map with weights of its own"


def _last_layer(network: nn.Module, graph: fx.Graph) -> str | None:
    """Name of the layer whose output is the network's, None where a function makes it."""
    node = list(graph.nodes)[-1].args[0]
    if node.op != "call_module":
        return None
    name = node.target
    while isinstance(module := network.get_submodule(name), nn.Sequential):
        name = f"{name}.{list(module._modules)[-1]}"
    return name


def split_at_pooling(network: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule, str]:
    """Cut a torchvision classifier in eval mode in two.

    Returns:
        What makes the pooled map of an image; what makes logits of a map of one position; and the name of the second's
        last layer. Both share the network's layers, under its names.

    Raises:
        ValueError: naming what the network does instead of averaging a feature map.
    """
    graph = _OutermostTracer().trace(network)
    poolings, last = [node for node in graph.nodes if _averages(node, network)], _last_layer(network, graph)
    if len(poolings) != 1 or last is None or not isinstance(network.get_submodule(last), nn.Linear):
        raise ValueError(
            f"{type(network).__name__} has no global average pooling of a feature map to replace: "
            f"{_what_it_does(network, graph)}."
        )
    body, head = fx.Graph(), fx.Graph()
    [pooled] = poolings[0].all_input_nodes
    copies, side = {}, body
    for node in graph.nodes:
        if node is poolings[0]:
            body.output(copies[pooled])
            copies, side = {pooled: head.placeholder("pooled")}, head
        copies[node] = side.node_copy(node, copies.__getitem__)
    return fx.GraphModule(network, body), fx.GraphModule(network, head), last


def create_network(config: TorchvisionConfig, num_labels: int) -> nn.Module:
    """The network of a config with random weights, in eval mode.

    Raises:
        ImportError: where torchvision is not installed.
    """
    try:  # here, since other backbones do without it
        from torchvision.models import get_model
    except ImportError:
        raise ImportError("backbone_config: torchvision's networks need `pip install torchvision`.") from None
    options = {**(config.options or {}), "num_classes": num_labels}
    try:
        return get_model(config.name, **options).eval()
    except NotImplementedError:  # RegNet computes its widths with tensors, which need data
        device = torch.get_default_device()
        with torch.device("cpu"):
            return get_model(config.name, **options).eval().to(device)


class TorchvisionNetwork(ClassifierNetwork, nn.Module):
    """A torchvision classifier without its last linear layer.

    Args:
        config: the network, by `name` and `options`.
        num_labels: classes of the head.

    Raises:
        ValueError: on a network that does not average a feature map.
    """

    captures_depths = True

    def __init__(self, config: TorchvisionConfig, num_labels: int):
        super().__init__()
        self.config, self.inner_layers, self.num_features = config, [], None
        self.body, self.head, last = split_at_pooling(create_network(config, num_labels))
        layer = self.head.get_submodule(last)
        if layer.bias is not None:
            self.num_features = layer.in_features
            self.head.set_submodule(last, nn.Identity())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(num_channels, height, width) of the images that the network is made for."""
        return 3, self.config.image_size, self.config.image_size

    @property
    def output_fmt(self) -> str:
        """Order of the axes of what the layers return, apart from the pooled map: Swin's have channels last."""
        return "NHWC" if "permute" in self.body._modules else "NCHW"

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The pooled map, (batch_size, num_channels, height, width); other depths are captured where they are made."""
        return self.body(pixel_values), []

    def readout(self, pooled: torch.Tensor, cls_token: None = None) -> torch.Tensor:
        """What the head makes of pooled vectors (..., num_channels): (..., num_features), or logits."""
        vectors = pooled.reshape(-1, pooled.shape[-1], 1, 1)
        return self.head(vectors).reshape(*pooled.shape[:-1], -1)

    def depths(self, pixel_values: torch.Tensor) -> dict[str, int]:
        """Number of channels of the last layer at each resolution, shallow to deep, by its name; the pooled map last.

        The first max-pooling ends the stem, and counts as it. The pooled map is called `"neck"` where it is no layer's
        output as it is.
        """
        shapes, pooled = self._shapes(pixel_values)
        axes = slice(2, 4) if self.output_fmt == "NCHW" else slice(1, 3)
        depths, has_stem = {}, False
        for name in self._stages(shapes, axes):
            if isinstance(self.body.get_submodule(name), nn.MaxPool2d) and not has_stem:
                depths, has_stem = {"stem": name}, True
            else:
                depths[shapes[name][axes]] = name
        channels = {name: shapes[name][1 if self.output_fmt == "NCHW" else 3] for name in depths.values()}
        last, node = list(channels)[-1], list(self.body.graph.nodes)[-1].args[0]
        if not (node.op == "call_module" and last.startswith(node.target)):
            del channels[last]
            last = NECK
        return channels | {last: pooled[1]}

    def _shapes(self, pixel_values: torch.Tensor) -> tuple[dict[str, torch.Size], torch.Size]:
        """Shapes of what the layers of the body and their children return, by name, and of the pooled map."""
        shapes = {}
        layers = [node.target for node in self.body.graph.nodes if node.op == "call_module"]
        parts = [f"{name}.{part}" for name in layers for part in self.body.get_submodule(name)._modules]
        handles = [
            self.body.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: shapes.update({name: output.shape})
            )
            for name in (*layers, *parts)
        ]
        pooled = self.body(pixel_values).shape
        for handle in handles:
            handle.remove()
        return shapes, pooled

    def _stages(self, shapes: dict[str, torch.Size], axes: slice) -> list[str]:
        """The body's layers; in place of a sequence through which the resolution falls, what it consists of."""
        stages = []
        for node in self.body.graph.nodes:
            if node.op != "call_module" or node.target == "permute":
                continue
            layer = self.body.get_submodule(node.target)
            parts = [f"{node.target}.{part}" for part in layer._modules] if isinstance(layer, nn.Sequential) else []
            falls = len({shapes[part][axes] for part in parts}) > 1
            stages += parts if falls else [node.target]
        return stages


__all__ = ["TorchvisionNetwork", "create_network", "split_at_pooling"]
