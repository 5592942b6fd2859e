"""The peak memory of this very process, from Linux's own books.

Not `getrusage`: its peak starts at the memory of the process that started this one.
"""

from pathlib import Path


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
