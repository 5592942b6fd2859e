"""How a command's process uses its machine: the CPUs it may compute with, and the memory that it frees."""

import ctypes
import os
import platform

# Of glibc's mallopt: how much of the heap's end may lie free, and how many blocks may lie elsewhere.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def own_cpus() -> int:
    """This process's share of the machine's CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def compute_threads() -> int:
    """Threads for torch on a CPU: what OMP_NUM_THREADS says, else all of this process's CPUs.

    accelerate's launcher sets one thread where nobody said anything, which would leave the other CPUs idle: under it,
    one thread counts as nothing said.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return int(asked) if asked.isdigit() and not (asked == "1" and launched) else own_cpus()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocations, where the C library is glibc.

    A forward pass on a CPU frees its feature maps and allocates them again in the next one. By itself glibc gives them
    back to the system in between, as its adaptive rule has it, and getting them again page by page takes up to half of
    the time. The process holds what was its peak until it ends, so this is for commands, not for a library.

    Returns:
        Whether it does; False where there is no glibc, or the environment says what it should do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


__all__ = ["compute_threads", "keep_freed_memory", "own_cpus"]
