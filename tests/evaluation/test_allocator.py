"""Freed memory is kept where the C library can be told to, and nothing happens where it cannot."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from castream.evaluation import allocator

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
import torch
from castream.evaluation.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def allocate_and_free():
    blocks = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each: glibc keeps none of them by itself
for _ in range(2):
    allocate_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    command = [sys.executable, "-c", PROGRAM, how]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again():
    assert page_faults("keep") < page_faults("leave") / 10


def test_an_environment_that_says_otherwise_is_obeyed(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
