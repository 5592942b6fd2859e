"""The precision that a run computes in, where its settings leave that open."""

import os
import time
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F
from tqdm import tqdm

from .arguments import TrainingArguments
from .run_folder import recorded_settings

ROUNDS = 5
WORTH_IT = 0.9  # of float32's time: for less, no digit is given away


def choose_precision(args: TrainingArguments) -> TrainingArguments:
    """The settings with `mixed_precision` decided, on all processes alike, and told in one line.

    What `accelerate config` or its launcher says is taken, and so is what an earlier start of the run found. Otherwise
    it is bf16 where that is faster here: on GPUs, and on CPUs with AMX or AVX512-BF16; other CPUs take longer for it.
    """
    if args.mixed_precision != "auto":
        return args
    state, found = PartialState(), [None]
    if state.is_main_process:
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        recorded = recorded_settings(args.output_dir).get("mixed_precision")
        found = [recorded or (configured if configured != "no" else measured_precision(state.device))]
    broadcast_object_list(found)
    return replace(args, mixed_precision=found[0])


def measured_precision(device: torch.device) -> str:
    """`"bf16"` where a convolution takes at most 0.9 of its time in float32, else `"no"`."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    images = torch.ones(8, 64, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(1 + ROUNDS):  # in turns; the first one makes what later ones keep
            for dtype, found in seconds.items():
                found.append(convolution_seconds(images.to(dtype), weight.to(dtype)))
    plain, half = (min(found[1:]) for found in seconds.values())
    precision = "bf16" if half <= WORTH_IT * plain else "no"
    tqdm.write(f"precision: {precision}; a convolution in bf16 took {half / plain:.2f} of its time in float32")
    return precision


def convolution_seconds(images: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    F.conv2d(images, weight).flatten()[0].item()  # waits for a GPU
    return time.perf_counter() - start
