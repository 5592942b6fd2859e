"""Convolutions, what is added to them and the activations after them in one pass over memory, on a CPU.

A network of small convolutions waits for memory: its activations and its sums read and write every feature map once
more for an operation per number. oneDNN, which torch computes convolutions with, applies them to what it has at hand;
torch's own compiler calls it in the same way. Which convolution is followed by what is seen while the network runs, so
that it does not matter how it is written down: a convolution that waits returns a placeholder, and what is done with
that first becomes part of the convolution, or makes it compute.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

CONVOLUTIONS = ("Conv2d", "Conv2dSame")  # torch's, and timm's that pads as TensorFlow does
# Activation, of its own arguments -> oneDNN's name of it and its arguments.
_ACTIVATIONS = {
    F.relu: lambda inplace=False: ("relu", []),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: ("hardtanh", [min_val, max_val]),
    F.relu6: lambda inplace=False: ("hardtanh", [0.0, 6.0]),
    F.silu: lambda inplace=False: ("swish", []),
    F.hardswish: lambda inplace=False: ("hardswish", []),
}
_AFTER_SUM = ("none", "relu")  # what torch lets oneDNN apply to a sum
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_SUMS_IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}
_NOTHING = ("none", [])

Pair = tuple[nn.Module, tuple[nn.Module, str, nn.Module]]


def find_followers(
    network: nn.Module, pixel_values: torch.Tensor, follows: Callable[[nn.Module], bool]
) -> tuple[list[Pair], object]:
    """Each convolution whose output another module takes as it is, with that module, its parent and its name there.

    Which follows which is seen on a forward pass. Modules that run twice are left out, and those whose output anyone
    reads by a hook, as a stream inside of a stage does.

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
    """A convolution on a CPU that takes a sum and an activation after it along, without gradient.

    In a dtype that oneDNN takes it returns a placeholder for what is done with it next, until it has seen
    that nothing of use is; in others it is the convolution. Weights are kept in the order in which oneDNN reads them,
    which saves arranging them in every pass, and in autocast's dtype, too, once it was used.

    Args:
        convolution: of torch, or timm's that pads as TensorFlow does.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution.to(memory_format=torch.channels_last)
        self._dtype = convolution.weight.dtype
        self.waits = {"convolution": True, "sum": True}  # for what follows the convolution, and a sum with it
        self._plans: dict[tuple[torch.dtype, torch.Size], _Plan] = {}
        self._weights: dict[tuple[torch.dtype, tuple[int, int]], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = _value(features)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype
        key = dtype, features.shape[2:]
        plan = self._plans.get(key)
        if plan is None:
            if not _is_supported(dtype):
                self.convolution.weight = nn.Parameter(self._plain_weight(), requires_grad=False)
                return self.convolution(features)
            plan = self._plans[key] = self._plan(*key)
        features = features.to(dtype)
        operands = (F.pad(features, plan.margins) if plan.margins else features, *plan.arguments)
        if not self.waits["convolution"]:
            return _compute(operands)
        return _Placeholder(self, operands, (len(features), self.convolution.out_channels, *plan.size))

    def _plan(self, dtype: torch.dtype, size: torch.Size) -> "_Plan":
        convolution, padding, front, margins = self.convolution, self.convolution.padding, (0, 0), []
        if type(convolution).__name__ == "Conv2dSame":
            (top, below), (left, right) = _same_margins(size, convolution)
            padding, front = (below, right), (below - top, right - left)
            if any(front) and max(convolution.dilation) > 1:
                padding, front, margins = (0, 0), (0, 0), [left, right, top, below]
                size = (size[0] + top + below, size[1] + left + right)
        geometry = (list(padding), list(convolution.stride), list(convolution.dilation), convolution.groups)
        output = [
            (pixels + 2 * pad - dilation * (kernel + more - 1) - 1) // stride + 1
            for pixels, kernel, more, pad, stride, dilation in zip(
                size, convolution.kernel_size, front, *geometry[:3], strict=True
            )
        ]
        return _Plan(margins, (*self._weight(dtype, front, geometry), *geometry), output)

    def _weight(
        self, dtype: torch.dtype, front: tuple[int, int], geometry: tuple
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in a dtype; `front` rows and columns of zeros before the kernel.

        oneDNN's call pads both sides alike. Where one more is wanted behind than before, one is padded before, too, and
        a kernel that begins with zeros does not see it: that spares a padded copy of the feature map.
        """
        if (dtype, front) not in self._weights:
            plain, bias = self._plain_weight(), self.convolution.bias
            weight = F.pad(plain.to(dtype), (front[1], 0, front[0], 0)).contiguous(memory_format=torch.channels_last)
            arranged = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, None)
            self._weights[dtype, front] = arranged, None if bias is None else bias.to(dtype)
            if dtype == plain.dtype and not any(front):
                self.convolution.weight = None  # one copy is enough
        return self._weights[dtype, front]

    def _plain_weight(self) -> torch.Tensor:
        """The weight as the convolution had it."""
        weight = self.convolution.weight
        return self._weights[self._dtype, (0, 0)][0].to_dense() if weight is None else weight


class _Plan(NamedTuple):
    """How feature maps of one size and dtype are convolved."""

    margins: list[int]  # zeros to put around them first
    arguments: tuple  # of the call, after the features: weight, bias, padding, stride, dilation and groups
    size: list[int]  # (height, width) of the output


def _compute(operands: tuple, addend: torch.Tensor | None = None, activation: tuple[str, list] = _NOTHING):
    """A convolution in one operation with what is added to it and the activation.

    Args:
        operands: features, weight, bias, padding, stride, dilation and groups.
        addend: of the output's shape and dtype, for "none" and "relu" alone.
        activation: oneDNN's name and its arguments.
    """
    features, *rest = operands
    name, values = activation
    operation = torch.ops.mkldnn._convolution_pointwise
    if addend is None:
        return operation(features, *rest, name, values, "")
    return operation.binary(features, addend, *rest, "add", None, None if name == "none" else name, [], "")


class _Placeholder(torch.Tensor):
    """A convolution's output before it is computed; whatever is neither a sum nor an activation reads its value."""

    @staticmethod
    def __new__(cls, convolution: FusedConvolution, operands: tuple, shape: tuple[int, ...], addend=None):
        placeholder = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=operands[0].dtype)
        placeholder.convolution, placeholder.operands, placeholder.addend = convolution, operands, addend
        placeholder.result = None  # a tensor, or a placeholder of the sum that was taken in place
        return placeholder

    def value(self) -> torch.Tensor:
        """What was computed; the convolution does not wait in vain again."""
        if self.result is None:
            self.convolution.waits["convolution" if self.addend is None else "sum"] = False
            self.result = _compute(self.operands, self.addend)
        return _value(self.result)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, output = kwargs or {}, None
        if func in _ACTIVATIONS and type(args[0]) is cls:
            output = args[0].activated(*_ACTIVATIONS[func](*args[1:], **kwargs))
        elif (func in _SUMS or func in _SUMS_IN_PLACE) and len(args) == 2 and not kwargs:
            output = args[0].plus(args[1]) if type(args[0]) is cls else None
            if output is None and func in _SUMS and type(args[1]) is cls:
                output = args[1].plus(args[0])
        if output is None:
            args, kwargs = tree_map_only(cls, cls.value, (args, kwargs))
            return func(*args, **kwargs)
        if func in _SUMS_IN_PLACE or kwargs.get("inplace"):
            args[0].result = output
        return output

    def activated(self, name: str, values: list[float]) -> torch.Tensor | None:
        """What an activation gives; None where it cannot be part of the convolution."""
        if self.result is not None or (self.addend is not None and name not in _AFTER_SUM):
            return None
        return _compute(self.operands, self.addend, (name, values))

    def plus(self, addend: object) -> torch.Tensor | None:
        """The sum, or a placeholder for what follows it; None where it cannot be part of the convolution."""
        if self.result is not None or self.addend is not None or not isinstance(addend, torch.Tensor):
            return None
        with torch._C.DisableTorchFunctionSubclass():  # shapes are known without a value
            if addend.shape != self.shape or addend.dtype != self.dtype:
                return None
            addend, shape = _value(addend), self.shape
        if not self.convolution.waits["sum"]:
            return _compute(self.operands, addend)
        return _Placeholder(self.convolution, self.operands, shape, addend)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value(tensor: object) -> object:
    return tensor.value() if isinstance(tensor, _Placeholder) else tensor


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


def fuse(network: nn.Module) -> bool:
    """Make each convolution of a network a `FusedConvolution`, in place.

    The network must be nobody else's, and is for inference only from then on.

    Returns:
        Whether anything was done: not where torch has no oneDNN, or the network is not on a CPU.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    fused = {
        child: FusedConvolution(child)
        for child in list(network.modules())
        if _is_fusable(child) and child.weight.device.type == "cpu"
    }
    for parent in [module for module in network.modules() if module not in fused]:
        for name, child in parent._modules.items():
            parent._modules[name] = fused.get(child, child)
    return bool(fused)


__all__ = ["CONVOLUTIONS", "FusedConvolution", "find_followers", "fuse"]
