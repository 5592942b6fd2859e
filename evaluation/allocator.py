"""What the C library does with freed memory."""

import ctypes
import os
import platform

# Of glibc's mallopt: how much of the heap's end may lie free, and how many blocks may lie elsewhere.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocations, where the C library is glibc.

    A forward pass on a CPU frees its feature maps and allocates them again in the next one. By itself glibc gives them
    back to the system in between, as its adaptive rule has it, and getting them again page by page takes up to a third
    of the time. The process holds what was its peak until it ends, so this is for commands, not for a library.

    Returns:
        Whether it does; False where there is no glibc, or the environment says what it should do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


__all__ = ["keep_freed_memory"]
