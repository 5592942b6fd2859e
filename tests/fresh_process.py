"""Run Python as a stranger's machine would: new process, other folder, offline, this package not installed."""

import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable

# An editable install puts a finder of its own on sys.meta_path, so that only refusing the name hides the package.
_HIDE_PACKAGE = """
import importlib.abc, sys
class _Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_castream":
            raise ModuleNotFoundError("No module named 'modeling_castream'", name=name)
sys.meta_path.insert(0, _Absent())
"""


def run_fresh(code: str, folder, **environment) -> str:
    """Run `code` with `folder` as working directory and Hub cache, and return what it printed.

    Raises:
        AssertionError: with the process's error output, where it fails.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    offline = {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", _HIDE_PACKAGE + textwrap.dedent(code)],
        cwd=folder,
        env={**inherited, **offline, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def fetch_page(start: Callable[[int], subprocess.Popen], path: str = "/") -> str:
    """What a page says that `start` serves at the port given; it is stopped afterwards.

    Raises:
        AssertionError: where there is none within four minutes, with what the process said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process, end = start(port), time.monotonic() + 240
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, _last_words(process)
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read().decode()
            except OSError:
                time.sleep(0.5)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _last_words(process: subprocess.Popen) -> tuple[str, str]:
    process.kill()
    return process.communicate()
