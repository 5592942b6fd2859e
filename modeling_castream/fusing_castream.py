"""Convolutions and the activations after them in one pass over memory, on a CPU.

A network of small convolutions waits for memory: its activations read and write every feature map once more for a
comparison per number. oneDNN, which torch computes convolutions with, applies them to what it has at hand; torch's own
compiler calls it in the same way.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

CONVOLUTIONS = ("Conv2d", "Conv2dSame")  # torch's, and timm's that pads as TensorFlow does
# Activation -> oneDNN's name of it and its arguments.
_OPERATIONS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}

Pair = tuple[nn.Module, tuple[nn.Module, str, nn.Module]]


def find_followers(
    network: nn.Module, pixel_values: torch.Tensor, follows: Callable[[nn.Module], bool]
) -> tuple[list[Pair], object]:
    """Each convolution whose output another module takes as it is, with that module, its parent and its name there.

    Which follows which is seen on a forward pass, so that it does not matter how the network writes it down. Modules
    that run twice are left out, and those whose output anyone reads by a hook, as a stream inside of a stage does.

    Args:
        pixel_values: an input of the network.
        follows: which modules are looked for.

    Returns:
        The pairs, and what the network returned.
    """
    made, pairs, handles = {}, [], []

    def note_output(convolution, args, output):
        made[id(output)] = convolution, output, output._version  # the output itself is kept: ids are used again

    def match_input(place, module, args):
        convolution, output, version = made.pop(id(args[0]), (None, None, None))
        if output is args[0] and version == args[0]._version:  # not changed in place since
            pairs.append((convolution, (*place, module)))

    for parent in network.modules():
        for name, child in parent.named_children():
            if child._forward_hooks:
                continue
            if type(child).__name__ in CONVOLUTIONS:
                handles.append(child.register_forward_hook(note_output))
            elif follows(child):
                handles.append(child.register_forward_pre_hook(partial(match_input, (parent, name))))
    try:
        output = network(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    used = [id(module) for convolution, (_, _, follower) in pairs for module in (convolution, follower)]
    return [pair for pair in pairs if used.count(id(pair[0])) == used.count(id(pair[1][2])) == 1], output


class FusedConvolution(nn.Module):
    """A convolution and its activation, without gradient.

    On a CPU and in a dtype that oneDNN takes they are one operation; elsewhere, one after the other. Weights are kept
    in autocast's dtype, too, once it was used, which saves converting them in every pass.

    Args:
        convolution: of torch, or timm's that pads as TensorFlow does.
        activation: one of those that oneDNN knows; None for a convolution alone.
    """

    def __init__(self, convolution: nn.Module, activation: nn.Module | None = None):
        super().__init__()
        self.convolution = convolution.to(memory_format=torch.channels_last)
        self.activation = activation or nn.Identity()
        self._operation = _OPERATIONS.get(type(activation), ("none", []))
        self._weights: dict[tuple[torch.dtype, tuple[int, int]], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype
        if features.device.type != "cpu" or not _is_supported(dtype):
            return self.activation(self.convolution(features))
        convolution, features, padding, front = self.convolution, features.to(dtype), self.convolution.padding, (0, 0)
        if type(convolution).__name__ == "Conv2dSame":
            margins = _same_margins(features.shape[2:], convolution)
            padding, front = zip(*((after, after - before) for before, after in margins), strict=True)
            if any(front) and max(convolution.dilation) > 1:
                (top, below), (left, right) = margins
                features, padding, front = F.pad(features, (left, right, top, below)), (0, 0), (0, 0)
        weight, bias = self._weight(dtype, front)
        arguments = (list(padding), list(convolution.stride), list(convolution.dilation), convolution.groups)
        name, values = self._operation
        return torch.ops.mkldnn._convolution_pointwise(features, weight, bias, *arguments, name, values, "")

    def _weight(self, dtype: torch.dtype, front: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in a dtype; `front` rows and columns of zeros before the kernel.

        oneDNN's call pads both sides alike. Where one more is wanted behind than before, one is padded before, too, and
        a kernel that begins with zeros does not see it: that spares a padded copy of the feature map.
        """
        if (dtype, front) not in self._weights:
            weight, bias = self.convolution.weight.to(dtype), self.convolution.bias
            weight = F.pad(weight, (front[1], 0, front[0], 0)).contiguous(memory_format=torch.channels_last)
            self._weights[dtype, front] = weight, None if bias is None else bias.to(dtype)
        return self._weights[dtype, front]


def _same_margins(sizes: tuple[int, int], convolution: nn.Module) -> list[tuple[int, int]]:
    """Zeros before and behind each axis, as TensorFlow's "same" has them: as many, or one more behind."""
    margins = []
    for size, kernel, stride, dilation in zip(
        sizes, convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
    ):
        lacking = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        margins.append((lacking // 2, lacking - lacking // 2))
    return margins


def _is_supported(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_fusable(convolution: nn.Module) -> bool:
    return (
        type(convolution).__name__ in CONVOLUTIONS
        and not convolution._forward_hooks
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def fuse_activations(network: nn.Module, pixel_values: torch.Tensor) -> object:
    """Make each convolution of a network one operation with the activation that follows it, in place.

    The network must be nobody else's, and is for inference only from then on. Nothing happens where torch has no
    oneDNN, or the network is not on a CPU.

    Args:
        pixel_values: an input of the network.

    Returns:
        What the network returned for it before; None where nothing happens.
    """
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    if pixel_values.device.type != "cpu" or not has_onednn:
        return None
    pairs, output = find_followers(network, pixel_values, lambda module: type(module) in _OPERATIONS)
    activations = {id(convolution): activation for convolution, (_, _, activation) in pairs if _is_fusable(convolution)}
    for convolution, (parent, name, _) in pairs:
        if id(convolution) in activations:
            setattr(parent, name, nn.Identity())
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if _is_fusable(child):
                setattr(parent, name, FusedConvolution(child, activations.get(id(child))))
    return output


__all__ = ["CONVOLUTIONS", "FusedConvolution", "find_followers", "fuse_activations"]
