"""The peak memory of this very process."""

import os
from pathlib import Path


def rise_of_peak(before: int) -> int:
    """By how many MiB the peak of this process's memory lies above `before`.

    Not `getrusage`: its peak starts at the memory of the process that started this one.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024 - before / 2**20)


def resident() -> int:
    """The memory of this process at the moment, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
