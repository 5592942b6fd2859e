"""Whether a processor computes faster in bfloat16 than in float32: GPUs and CPUs with AMX or AVX512-BF16 do."""

import time
from functools import cache

import torch
from torch.nn import functional as F

ROUNDS = 5
WORTH_IT = 0.9  # of float32's time: for less, no digit is given away


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether a convolution in bfloat16 takes at most 0.9 of its time in float32."""
    return bfloat16_share(device) <= WORTH_IT


@cache
def bfloat16_share(device: torch.device) -> float:
    """A convolution's time in bfloat16, of its time in float32; tried once per process."""
    images = torch.ones(8, 64, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    seconds = {torch.float32: [], torch.bfloat16: []}
    with torch.no_grad():
        for _ in range(1 + ROUNDS):  # in turns; the first one makes what later ones keep
            for dtype, found in seconds.items():
                found.append(_convolution_seconds(images.to(dtype), weight.to(dtype)))
    plain, half = (min(found[1:]) for found in seconds.values())
    return half / plain


def _convolution_seconds(images: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    F.conv2d(images, weight).flatten()[0].item()  # waits for a GPU
    return time.perf_counter() - start
