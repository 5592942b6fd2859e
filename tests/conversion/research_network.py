"""State dicts of the networks of the authors' code: torchvision's names, with a stream beside them."""

import torch
import torchvision

from tests.reference.formula import formula_array

_BLOCKS = ("base", "l1", "l2", "l3", "l4")


def _stream_channels(network: str, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Channels of the feature maps that the stream reads, from the weights that make them."""
    if network.startswith("resnet"):
        last = "conv3" if "layer1.0.conv3.weight" in shapes else "conv2"
        return [64, *(shapes[f"layer{stage}.0.{last}.weight"][0] for stage in (1, 2, 3, 4))]
    if network.startswith("convnext"):
        return [shapes["features.0.0.weight"][0], *(shapes[f"features.{index}.1.weight"][0] for index in (2, 4, 6))]
    outputs = [  # of the last convolution in each stage's first block
        [shape[0] for name, shape in shapes.items() if name.startswith(f"features.{stage}.0.") and len(shape) == 4][-1]
        for stage in range(1, 8)
    ]
    return [shapes["features.0.0.weight"][0], *outputs, shapes["features.8.0.weight"][0]]


def research_shapes(architecture: str, num_classes: int = 10, project: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of `resnet18_stream`, `resnet18_final`, `convnext_tiny_stream`..."""
    network, _, variant = architecture.rpartition("_")
    with torch.device("meta"):
        model = torchvision.models.get_model(network, num_classes=num_classes)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    channels = _stream_channels(network, shapes)
    if variant == "final":
        channels = channels[-1:]
        # only the stem's convolution and the first of each block go by the other name
        shapes = {name.replace("conv1.", "confinal."): shape for name, shape in shapes.items()}
        blocks = ("cls_surrogate",) if project else ()
    else:
        blocks = _BLOCKS if network.startswith("resnet") else [f"cls_stream.{i}" for i in range(len(channels))]
    stream = {"cls_token": (1, 1, channels[0])}
    for block, inputs, outputs in zip(blocks, channels, [*channels[1:], channels[-1]], strict=False):
        stream |= {f"{block}.to_out.1.weight": (outputs, inputs), f"{block}.to_out.1.bias": (outputs,)}
    return stream | shapes


def research_state(architecture: str, conv_gain: float = 1.0, **options) -> dict[str, torch.Tensor]:
    """The state dict with formula weights."""
    shapes = research_shapes(architecture, **options)
    return {name: torch.from_numpy(formula_array(name, shape, conv_gain)) for name, shape in shapes.items()}
