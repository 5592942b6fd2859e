"""The embedded dataset: procedural scenes, written once as sharded parquet and then streamed like any other dataset.

    folder = write_scenes()
    train = load_dataset("parquet", data_files=scenes_data_files(folder), split="train", streaming=True)

Each row has `image` (JPEG, RGB), `mask` (PNG, 255 where the object is visible, else 0), `label` (a class, with its
name) and `index` (its place within the split).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from castream.artifacts.files import cache_folder
from datasets import ClassLabel, Features, Image, Value
from filelock import FileLock
from tqdm import tqdm

from . import rendering, shapes, workers
from .rendering import CLASS_NAMES
from .workers import encode_scene, ordered_map

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
ROW_GROUP_SIZE = 64  # what a stream must read before its first row; also the grain of IterableDataset.reshard()

FEATURES = Features(
    {"image": Image(), "mask": Image(), "label": ClassLabel(names=list(CLASS_NAMES)), "index": Value("int64")}
)


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

    The folder gets its name when it is complete, and not before: an interrupted call leaves nothing under that name,
    and the next one starts afresh. Several processes may call at once: one writes, the others wait for it.

    Args:
        cache_dir: folder of the cache; None means `cache_folder()`.
        seed: of the dataset, >= 0.
        num_train, num_validation: images per split; a multiple of the number of classes gives equal classes.
        shards_per_split: parquet files per split.
        size: height and width of the images in pixels, >= 32.
        num_workers: processes that draw; None means one a CPU. The contents do not depend on it.
        progress: show a progress bar.

    Raises:
        ValueError: for a value out of range, or more shards than images.
        OSError: if the cache cannot be written, naming the folder.
    """
    counts = {"train": num_train, "validation": num_validation}
    _validate(seed, counts, shards_per_split, size)
    cache_dir = Path(cache_dir) if cache_dir is not None else cache_folder()
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


def _validate(seed: int, counts: dict[str, int], shards: int, size: int) -> None:
    lowest = {"seed": (seed, 0), "shards_per_split": (shards, 1), "size": (size, rendering.MIN_SIZE)}
    lowest |= {f"num_{split}": (count, 1) for split, count in counts.items()}
    for name, (value, bound) in lowest.items():
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
    if shards > min(counts.values()):
        raise ValueError(f"shards_per_split={shards} exceeds the {min(counts.values())} images of a split; lower it")


def _folder_name(seed: int, counts: dict[str, int], shards: int, size: int) -> str:
    """Name that tells the parameters, with a digest of all that decides the contents, the drawing code included."""
    parameters = {"counts": counts, "shards": shards, "row_group": ROW_GROUP_SIZE}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for module in (rendering, shapes, workers):
        digest.update(Path(module.__file__).read_bytes())
    sizes = "-".join(str(count) for count in counts.values())
    return f"scenes-v{FORMAT_VERSION}-seed{seed}-{sizes}-{size}px-{digest.hexdigest()[:12]}"


@contextmanager
def _explained(cache_dir: Path) -> Iterator[None]:
    """Turn an operating system's refusal (no permission, no space) into one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        remedy = "free space there or set CASTREAM_CACHE to another folder"
        raise OSError(error.errno, f"cannot write the scenes dataset to {cache_dir}: {reason}; {remedy}") from error


def _write_folder(
    final: Path, seed: int, counts: dict[str, int], shards: int, size: int, num_workers: int | None, progress: bool
) -> None:
    """Build the dataset beside `final`, then give it that name. Under the lock, leftovers there are a dead writer's."""
    incomplete = final.with_name(final.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir()
    bar = tqdm(total=sum(counts.values()), desc="drawing scenes", unit="img", disable=not progress)
    try:
        with bar, ordered_map(num_workers) as spread:
            for split, count in counts.items():
                rows = iter(spread(partial(encode_scene, seed, split, size), range(count)))
                for shard in range(shards):
                    path = incomplete / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                    _write_shard(path, rows, count * (shard + 1) // shards - count * shard // shards, bar)
        os.replace(incomplete, final)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _write_shard(path: Path, rows: Iterator[dict], count: int, bar: tqdm) -> None:
    """Take `count` rows and write them as one parquet file whose schema carries the features."""
    with pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
        while count > 0:
            group = [next(rows) for _ in range(min(count, ROW_GROUP_SIZE))]
            writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
            count -= len(group)
            bar.update(len(group))
