"""train.py as a command: started, watched and killed like a user's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parents[2]


def start(
    options: dict,
    *launcher: str,
    script: Path = ROOT / "train.py",
    output: IO | int = subprocess.PIPE,
    **environment: str,
) -> subprocess.Popen:
    """Start train.py in a session of its own.

    Args:
        options: its settings; None is written as `none`.
        launcher: words before the script; none: this Python.
        script: in its place.
        output: where both streams go; by default a pipe for each.
    """
    words = [word for name, value in options.items() for word in (f"--{name}", "none" if value is None else str(value))]
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(script), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        stdout=output,
        stderr=output if output is subprocess.PIPE else subprocess.STDOUT,
        start_new_session=True,
    )


def torchrun(port: int) -> tuple[str, ...]:
    """The launcher for two processes; `accelerate launch --cpu --num_processes 2` starts one."""
    return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 to a process and all that it started: torchrun gives its workers sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in (process, *family):
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)
