"""The memory of this very process: its peak, from Linux's own books, and what glibc does with freed blocks.

Not `getrusage`: its peak starts at the memory of the process that started this one.
"""

import ctypes
from pathlib import Path

# Of glibc's mallopt, and the largest block that it lets stay on the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_BLOCK = -1, -3, 2**25


def _status(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def resident() -> float:
    """The process's memory at the moment, MiB."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Let the peak start anew from the memory of the moment."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The process's highest memory since `forget_peak`, MiB."""
    return _status("VmHWM")


def keep_freed() -> None:
    """Let the process keep what it frees for its next allocations.

    By itself glibc gives blocks back to the system by an adaptive rule, and the faults of getting them again make up to
    a third of a forward pass, in one contender and not in the other, as it happens.
    """
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        raise OSError("glibc refuses to keep freed memory: timings would depend on its adaptive rule")
