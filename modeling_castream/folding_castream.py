"""A backbone's batch norms folded into its convolutions, for everything that looks at a network and does not change it.

In eval mode a batch norm is a scale and a shift per channel, so that the convolution before it can do its work:

    BN(W * x + b) = (s W) * x + s (b - mean) + shift,    s = weight / sqrt(var + eps)

On a CPU, activations and sums are fused with the convolutions, too (`fusing_castream`). The copy is made once per
backbone and made again when a weight of the original changes. Within `folding()` a model's `extract_features` runs it,
unless something asks for a gradient through the backbone.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from .fusing_castream import find_followers, fuse

_TOLERANCE = 1e-4  # of the largest value that comes out: rounding stays far below, a wrong pair far above

_wanted: ContextVar[bool] = ContextVar("castream_folding", default=False)
# Backbone -> (its weights' state, its folded copy or None).
_folded: WeakKeyDictionary[nn.Module, tuple[tuple, nn.Module | None]] = WeakKeyDictionary()
_building = Lock()


@contextmanager
def folding() -> Iterator[None]:
    """Feature maps from folded copies, for what looks at a network and does not change it."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def inference_backbone(backbone: nn.Module, pixel_values: torch.Tensor) -> nn.Module:
    """The backbone to run: its folded copy within `folding()`, where there is one and no gradient is asked for."""
    if torch.compiler.is_compiling() or backbone._compiled_call_impl is not None:  # a compiler folds by itself
        return backbone
    if not _wanted.get() or backbone.training or torch.is_grad_enabled():
        return backbone
    if pixel_values.device.type == "cpu" and not pixel_values.sum().isfinite():  # oneDNN's ReLU makes 0 of NaN
        return backbone
    state = _state(backbone)
    with _building:  # threads that share a model share its copy
        known = _folded.get(backbone)
        if known is None or known[0] != state:
            with torch.autocast(pixel_values.device.type, enabled=False):
                known = _folded[backbone] = (state, _inference_copy(backbone, pixel_values[:1].to(_dtype(backbone))))
    return known[1] or backbone


def _state(backbone: nn.Module) -> tuple:
    """What changes when a weight does: where each lies, and how often it was written to."""
    return tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        for tensors in (backbone.parameters(), backbone.buffers())
        for tensor in tensors
    )


@torch.no_grad()
def _inference_copy(backbone: nn.Module, pixel_values: torch.Tensor) -> nn.Module | None:
    """A copy with folded batch norms and fused activations and sums; None where there is nothing to fold."""
    # raised by a network that does more with its convolutions than call them
    with suppress(AttributeError, RuntimeError, TypeError):
        if pixel_values.device.type == "cpu":
            twin, expected = _fold(backbone, pixel_values)
            if twin is not None and fuse(twin) and _agree(twin, pixel_values, expected):
                return twin
    return fold_batch_norms(backbone, pixel_values)


def _dtype(backbone: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in backbone.parameters()), torch.get_default_dtype())


def fold_batch_norms(backbone: nn.Module, pixel_values: torch.Tensor) -> nn.Module | None:
    """A copy of a network in eval mode whose batch norms are folded into the convolutions that they follow.

    What comes out is compared with the original's, on the CPU: a GPU may round to TF32 on the way.

    Args:
        pixel_values: an input of the network, (batch_size, num_channels, height, width).

    Returns:
        The copy; None where nothing can be folded, or where the copy computes something else (a convolution whose
        output goes elsewhere, too).
    """
    device, pixel_values = pixel_values.device, pixel_values.cpu()
    twin, expected = _fold(backbone, pixel_values)
    return twin.to(device) if twin is not None and _agree(twin, pixel_values, expected) else None


@torch.no_grad()
def _fold(backbone: nn.Module, pixel_values: torch.Tensor) -> tuple[nn.Module | None, object]:
    """A copy on the CPU that may compute something else, and what the original computes; None where nothing folds."""
    if not any(_is_scale_and_shift(module) for module in backbone.modules()):
        return None, None
    twin = copy.deepcopy(backbone).cpu().eval().requires_grad_(False)
    pairs, expected = find_followers(twin, pixel_values, _is_scale_and_shift)
    for convolution, (parent, name, norm) in pairs:
        weights = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *weights)
        setattr(parent, name, _after_scale_and_shift(norm))
    return (twin if pairs else None), expected


@torch.no_grad()
def _agree(twin: nn.Module, pixel_values: torch.Tensor, expected: object) -> bool:
    """Whether a copy computes what its original computed, up to rounding."""
    pairs = zip(_tensors(twin(pixel_values)), _tensors(expected), strict=True)
    return all((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max() for ours, theirs in pairs)


def _is_scale_and_shift(module: nn.Module) -> bool:
    """Whether a module is a batch norm in eval mode: torch's, or timm's that ends with an activation."""
    fused = isinstance(module, nn.BatchNorm2d) and {"drop", "act"} <= set(module._modules)
    return (fused or type(module) is nn.BatchNorm2d) and module.running_mean is not None


def _after_scale_and_shift(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a batch norm without its scale and shift: nothing, or timm's dropout and activation."""
    return nn.Sequential(norm.drop, norm.act) if "act" in norm._modules else nn.Identity()


def _tensors(output) -> list[torch.Tensor]:
    """All tensors in a network's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
