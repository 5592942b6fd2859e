"""The precision that a run computes in, where its settings leave that open."""

import os
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from castream.artifacts.precision import bfloat16_share, prefers_bfloat16
from tqdm import tqdm

from .arguments import TrainingArguments
from .run_folder import recorded_settings


def choose_precision(args: TrainingArguments) -> TrainingArguments:
    """The settings with `mixed_precision` decided, on all processes alike.

    What an earlier start of the run found is taken, or the bf16 or fp16 that accelerate was told; its "no" says
    nothing, since its launcher gives that where nobody said anything. Otherwise it is bf16 where a trial finds that
    faster, which is then told in one line.
    """
    if args.mixed_precision != "auto":
        return args
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as Accelerator makes it, which is to find it
    found = [None]
    if state.is_main_process:
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        recorded = recorded_settings(args.output_dir).get("mixed_precision")
        found = [recorded or (configured if configured != "no" else measured_precision(state.device))]
    broadcast_object_list(found)
    return replace(args, mixed_precision=found[0])


def measured_precision(device: torch.device) -> str:
    """`"bf16"` where that is faster here, else `"no"`."""
    precision = "bf16" if prefers_bfloat16(device) else "no"
    tqdm.write(
        f"precision: {precision}; a convolution in bf16 takes {bfloat16_share(device):.2f} of its time in float32"
    )
    return precision
