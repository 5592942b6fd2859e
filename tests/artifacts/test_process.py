"""Commands use the CPUs they have, and freed memory is kept where the C library can be told to."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from castream.artifacts import process

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
import torch
from castream.artifacts.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def allocate_and_free():
    blocks = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each: glibc keeps none of them by itself
for _ in range(5):  # until the heap has found its layout
    allocate_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    environment = {name: value for name, value in os.environ.items() if name not in process.VARIABLES}
    command = [sys.executable, "-c", PROGRAM, how]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again():
    assert page_faults("keep") < page_faults("leave") / 10


def test_an_environment_that_says_otherwise_is_obeyed(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not process.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not process.keep_freed_memory()


@pytest.mark.parametrize(
    ("threads", "launched", "expected"), [("3", True, 3), ("1", False, 1), ("1", True, 4), (None, False, 4)]
)
def test_the_launchers_one_thread_is_nobodys_wish(monkeypatch, threads, launched, expected):
    monkeypatch.setattr(process, "own_cpus", lambda: 4)
    for name, value in (("OMP_NUM_THREADS", threads), ("ACCELERATE_MIXED_PRECISION", "no" if launched else None)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert process.compute_threads() == expected
