"""The memory and the clock of the device that a benchmark runs on.

On a CPU the peak is that of this very process, from Linux's own books. Not `getrusage`: its peak starts at the memory
of the process that started this one. On a GPU it is that of torch's tensors there.
"""

from pathlib import Path

import torch

MIB = 2**20


def _status(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def resident(device: str = "cpu") -> float:
    """The memory at the moment, MiB."""
    return torch.cuda.memory_allocated() / MIB if device == "cuda" else _status("VmRSS")


def forget_peak(device: str = "cpu") -> None:
    """Let the peak start anew from the memory of the moment."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str = "cpu") -> float:
    """The highest memory since `forget_peak`, MiB."""
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else _status("VmHWM")


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def hardware(device: str, threads: int) -> str:
    """The versions and the device, for the head of a table."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"
    return f"torch {torch.__version__}, {where}"
