"""The embedded dataset: procedural scenes, written once as sharded parquet into a cache and then streamed like any other dataset.

    from datasets import load_dataset
    folder = write_scenes()
    train = load_dataset("parquet", data_files=scenes_data_files(folder), split="train", streaming=True)

Each row has `image` (JPEG, RGB), `mask` (PNG, 255 on the object), `label` (class, with its name) and `index` (place within the split).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from filelock import FileLock
from tqdm import tqdm

from . import rendering, rendering_shapes
from .rendering import CLASS_NAMES, encode_scene

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
ROW_GROUP_SIZE = 64  # what a stream must read before its first row; also the grain of IterableDataset.reshard()

FEATURES = Features(
    {"image": Image(), "mask": Image(), "label": ClassLabel(names=list(CLASS_NAMES)), "index": Value("int64")}
)


def default_cache_dir() -> Path:
    """`$CASTREAM_CACHE`, or else `~/.cache/castream`."""
    return Path(os.environ.get("CASTREAM_CACHE") or Path.home() / ".cache" / "castream")


def write_scenes(
    cache_dir: str | Path | None = None,
    seed: int = 0,
    num_train: int = 2400,
    num_validation: int = 480,
    shards_per_split: int = 4,
    size: int = 224,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the dataset, unless the cache holds it already, and return its folder.

    The folder gets its name when it is complete, and not before: an interrupted call leaves nothing under that name, and the next one
    starts afresh. Several processes may call at once; one writes and the others wait for it.

    Args:
        cache_dir: folder of the cache; None means `default_cache_dir()`.
        seed: of the dataset, >= 0.
        num_train, num_validation: images per split; a multiple of the number of classes gives exactly balanced labels.
        shards_per_split: parquet files per split.
        size: height and width of the images in pixels.
        num_workers: processes that draw; None means one a CPU. The contents do not depend on it.
        progress: show a progress bar.

    Raises:
        ValueError: for a count that is not positive, or more shards than images.
        OSError: if the cache cannot be written, naming the folder.
    """
    counts = {"train": num_train, "validation": num_validation}
    for name, value in {
        "num_train": num_train,
        "num_validation": num_validation,
        "shards_per_split": shards_per_split,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if shards_per_split > min(counts.values()):
        raise ValueError(
            f"shards_per_split={shards_per_split} exceeds the {min(counts.values())} images of a split; lower it"
        )
    cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    final = cache_dir / _folder_name(seed, counts, shards_per_split, size)
    if final.is_dir():
        return final
    with _explained(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{final.name}.lock"):
            if not final.is_dir():
                _write_folder(final, seed, counts, shards_per_split, size, num_workers, progress)
    return final


def scenes_data_files(folder: str | Path) -> dict[str, list[str]]:
    """The parquet files of each split, for `load_dataset("parquet", data_files=...)`."""
    return {split: sorted(str(path) for path in Path(folder).glob(f"{split}-*.parquet")) for split in SPLITS}


def _folder_name(seed: int, counts: dict[str, int], shards: int, size: int) -> str:
    """Name that tells the parameters, with a digest of everything that decides the contents, the drawing code included."""
    parameters = {"version": FORMAT_VERSION, "seed": seed, "counts": counts, "shards": shards, "size": size}
    parameters |= {"row_group": ROW_GROUP_SIZE, "classes": CLASS_NAMES}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for module in (rendering, rendering_shapes):
        digest.update(Path(module.__file__).read_bytes())
    sizes = "-".join(str(count) for count in counts.values())
    return f"scenes-v{FORMAT_VERSION}-seed{seed}-{sizes}-{size}px-{digest.hexdigest()[:12]}"


@contextmanager
def _explained(cache_dir: Path) -> Iterator[None]:
    """Turn an operating system's refusal (no permission, no space) into one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        message = f"cannot write the scenes dataset to {cache_dir}: {reason}; free some space there or set CASTREAM_CACHE to another folder"
        raise OSError(error.errno, message) from error


def _write_folder(
    final: Path, seed: int, counts: dict[str, int], shards: int, size: int, num_workers: int | None, progress: bool
) -> None:
    """Build the dataset in a sibling folder, then give it its name. The caller holds the lock, so leftovers there are a dead writer's."""
    partial_folder = final.with_name(final.name + ".incomplete")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    try:
        total = sum(counts.values())
        with (
            _encoder(num_workers) as encode,
            tqdm(total=total, desc="drawing scenes", unit="img", disable=not progress) as bar,
        ):
            for split, count in counts.items():
                rows = encode(partial(encode_scene, seed, split, size), range(count))
                for shard in range(shards):
                    path = partial_folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                    _write_shard(path, rows, count * (shard + 1) // shards - count * shard // shards, bar)
        os.replace(partial_folder, final)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


@contextmanager
def _encoder(num_workers: int | None) -> Iterator:
    """A lazy, ordered `map`, spread over processes.

    Processes are spawned, not forked: the caller may hold a GPU or the threads of a numerical library, which do not survive a fork.
    Spawning imports the main script again, so where there is none to import (a script on standard input) the work is done here.
    """
    num_workers = num_workers or os.cpu_count() or 1
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if num_workers == 1 or (main_file is not None and not Path(main_file).exists()):
        yield map
        return
    executor = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    try:
        yield partial(executor.map, chunksize=16)
    finally:
        executor.shutdown(cancel_futures=True)


def _write_shard(path: Path, rows: Iterator[dict], count: int, bar: tqdm) -> None:
    """Take `count` rows and write them as one parquet file whose schema carries the features."""
    with pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
        while count > 0:
            group = [next(rows) for _ in range(min(count, ROW_GROUP_SIZE))]
            writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
            count -= len(group)
            bar.update(len(group))
