"""Draws and encodes the rows of the embedded dataset, on several processes.

Kept apart from `scenes.py` so that a worker starts without the data libraries.
"""

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

from .rendering import render_scene

JPEG_QUALITY = 92


def encode_scene(seed: int, split: str, size: int, index: int) -> dict:
    """One row of the dataset, its pictures encoded as in the parquet files."""
    scene = render_scene(seed, index, size, split=split)
    image, mask = io.BytesIO(), io.BytesIO()
    scene.image.save(image, "JPEG", quality=JPEG_QUALITY)
    scene.mask.save(mask, "PNG")
    name = f"{split}-{index:06d}"
    return {
        "image": {"bytes": image.getvalue(), "path": f"{name}.jpg"},
        "mask": {"bytes": mask.getvalue(), "path": f"{name}-mask.png"},
        "label": scene.label,
        "index": index,
    }


@contextmanager
def ordered_map(num_workers: int | None) -> Iterator[Callable]:
    """A `map` that keeps the order and spreads the work over processes; None means one a CPU.

    Processes are spawned, not forked: the caller may hold a GPU or the threads of a numerical library, which do not
    survive a fork. Spawning imports the main script again, so where that is no file (a script on standard input) the
    work is done in this process.
    """
    num_workers = num_workers or os.cpu_count() or 1
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if num_workers == 1 or (main_file is not None and not Path(main_file).exists()):
        yield map
        return
    executor = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        yield partial(executor.map, chunksize=16)
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when its parent is gone: killed outright, a parent has no chance to tell its workers."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
