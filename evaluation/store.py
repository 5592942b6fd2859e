"""The per-image table on disk: parts while a run goes on, one file at its end.

A part is a parquet file that carries the numbers of the blocks it holds, and the images that were skipped in them, in
its schema's metadata; it appears under its name whole or not at all. A killed run therefore loses at most the blocks
since its last part, and a new one reads what is there and computes the rest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from castream.artifacts.files import new_file, read_json, write_json

from .settings import METRICS

METADATA_KEY = b"castream"
ROWS_PER_GROUP = 2**13  # of a parquet file: what is in memory at a time where rows are read one after the other
IMAGES_PER_MERGE = 1024
TABLE_NAME = "per_image.parquet"

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("target", pa.int64()),
        ("predicted", pa.int64()),
        ("correct", pa.bool_()),
        ("method", pa.string()),
        ("pooling", pa.string()),
        ("control", pa.string()),
        ("scoring", pa.string()),
        ("probability", pa.float64()),
        ("probability_masked", pa.float64()),
        ("map_area", pa.float64()),
        ("empty_map", pa.bool_()),
        *((name, pa.float64()) for name in METRICS),
        ("randomization_correlation", pa.float64()),
        ("insertion_curve", pa.list_(pa.float32())),
        ("deletion_curve", pa.list_(pa.float32())),
    ]
)


@dataclass
class Part:
    """Some blocks' share of the per-image table.

    Args:
        table: the rows, in SCHEMA.
        blocks: numbers of the blocks that are complete.
        skipped: images that could not be decoded, {"index", "id", "reason"}.
    """

    table: pa.Table = field(default_factory=SCHEMA.empty_table)
    blocks: list[int] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    @classmethod
    def of_block(cls, number: int, rows: list[dict], skipped: list[dict]) -> "Part":
        """One block; `rows` are dictionaries whose missing columns become null."""
        return cls(pa.Table.from_pylist(rows, schema=SCHEMA), [number], skipped)

    @classmethod
    def merge(cls, parts: list["Part"]) -> "Part":
        """All parts in one, ordered by image; the rows of an image keep their order."""
        # a part of an earlier version lacks the columns of metrics that came later
        tables = [SCHEMA.empty_table(), *(part.table for part in parts)]
        table = pa.concat_tables(tables, promote_options="default")
        table = table.take(pc.sort_indices(table, sort_keys=[("index", "ascending")]))  # a stable sort
        skipped = sorted(chain.from_iterable(part.skipped for part in parts), key=lambda entry: entry["index"])
        return cls(table, sorted(chain.from_iterable(part.blocks for part in parts)), skipped)

    def write(self, path: Path) -> None:
        """Write a parquet file."""
        with pq.ParquetWriter(path, _schema(self.blocks, self.skipped)) as writer:
            writer.write_table(self.table.cast(writer.schema), row_group_size=ROWS_PER_GROUP)

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        yield from self.table.select(names).to_batches(max_chunksize=ROWS_PER_GROUP)

    def table_of(self, names: list[str]) -> pa.Table:
        """Some columns."""
        return self.table.select(names)

    def indices(self) -> np.ndarray:
        """Images that the part holds, in order."""
        return np.unique(self.table.column("index").to_numpy())


@dataclass
class SavedPart:
    """A part on disk: the table is read when it is asked for, by columns where that is all that is needed.

    Args:
        path: what `Part.write` or `merge_files` wrote.
    """

    path: Path

    def __post_init__(self):
        metadata = json.loads(pq.read_schema(self.path).metadata[METADATA_KEY])
        self.blocks, self.skipped = metadata["blocks"], metadata["skipped"]

    @property
    def table(self) -> pa.Table:
        """The rows, in SCHEMA; columns that an earlier version did not know are null."""
        table = pq.read_table(self.path).replace_schema_metadata(None)
        return pa.concat_tables([SCHEMA.empty_table(), table], promote_options="default")

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):  # `iter_batches` holds all that it has read until it ends
                yield from file.read_row_group(group, columns=names).to_batches(max_chunksize=ROWS_PER_GROUP)

    def table_of(self, names: list[str]) -> pa.Table:
        """Some columns."""
        missing = [name for name in names if name not in pq.read_schema(self.path).names]
        return self.table.select(names) if missing else pq.read_table(self.path, columns=names)

    def indices(self) -> np.ndarray:
        """Images that the part holds, in order."""
        found = [np.unique(batch.column(0).to_numpy()) for batch in self.batches(["index"])]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def merge_files(parts: list[SavedPart], path: Path) -> None:
    """Write parts as one file, ordered by image, with a few thousand images in memory at a time; the rows of an image
    keep their order."""
    blocks = sorted(chain.from_iterable(part.blocks for part in parts))
    skipped = sorted(chain.from_iterable(part.skipped for part in parts), key=lambda entry: entry["index"])
    ranges = [(indices.min(), indices.max()) if len(indices := part.indices()) else (0, -1) for part in parts]
    last = max((high for _, high in ranges), default=-1)
    with pq.ParquetWriter(path, _schema(blocks, skipped)) as writer:
        for first in range(0, last + 1, IMAGES_PER_MERGE):
            end = first + IMAGES_PER_MERGE
            window = [("index", ">=", first), ("index", "<", end)]
            touched = [
                part.path for part, (low, high) in zip(parts, ranges, strict=True) if low < end and high >= first
            ]
            tables = [pq.read_table(path, filters=window).replace_schema_metadata(None) for path in touched]
            merged = Part.merge([Part(table) for table in tables]).table
            writer.write_table(merged.cast(writer.schema), row_group_size=ROWS_PER_GROUP)


def _schema(blocks: list[int], skipped: list[dict]) -> pa.Schema:
    return SCHEMA.with_metadata({METADATA_KEY: json.dumps({"blocks": blocks, "skipped": skipped})})


def fingerprint_processor(image_processor) -> str:
    """A digest of an image processor's settings."""
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else {}
    text = json.dumps([type(image_processor).__name__, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """An evaluation's output folder.

    Args:
        folder: created if missing.
        identity: what must be equal for a run to go on where another one ended: a flat dictionary for JSON.

    Raises:
        ValueError: the folder holds an evaluation with another identity, or cannot be written.
    """

    def __init__(self, folder: str | Path, identity: dict):
        self.folder, self.partial = Path(folder), Path(folder) / "partial"
        self.identity = json.loads(json.dumps(identity))

    def claim(self) -> None:
        """Create the folder and write down whose it is; by one process."""
        path = self.folder / "evaluation.json"
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._check(read_json(path))
            elif (self.folder / TABLE_NAME).exists():
                raise ValueError(
                    f"output_dir {self.folder} holds {TABLE_NAME} of something else: choose another folder."
                )
            else:
                write_json(path, self.identity)
        except OSError as error:
            raise ValueError(f"output_dir {self.folder} cannot be used: {error}.") from None

    def release(self) -> None:
        """Give the folder up again if nothing is finished in it."""
        if not self.parts():
            (self.folder / "evaluation.json").unlink(missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)

    def _check(self, found: dict) -> None:
        names = [name for name in self.identity | found if self.identity.get(name) != found.get(name)]
        if names:
            differences = ", ".join(
                f"{name}: {found.get(name)} there, {self.identity.get(name)} here" for name in names
            )
            raise ValueError(
                f"output_dir {self.folder} holds an evaluation with other settings ({differences}): "
                "choose another folder or delete it."
            )

    def parts(self) -> list[SavedPart]:
        """All that is finished: the table, where there is one, and what is not in it yet."""
        parts, known = [], set()
        for path in (self.folder / TABLE_NAME, *sorted(self.partial.glob("part-*.parquet"))):
            if path.exists() and not known.issuperset((part := SavedPart(path)).blocks):
                parts.append(part)
                known.update(part.blocks)
        return parts

    def merge(self) -> None:
        """Write all parts as one table; by one process."""
        table, parts = self.folder / TABLE_NAME, self.parts()
        if [part.path for part in parts] != [table]:
            with new_file(table) as partial:
                merge_files(parts, partial)

    def read(self) -> SavedPart:
        """The table that `merge` wrote."""
        return SavedPart(self.folder / TABLE_NAME)

    def write_part(self, part: Part) -> None:
        """Add a part; its name is that of its first block, which no other process has."""
        with new_file(self.partial / f"part-{part.blocks[0]:08d}.parquet") as partial:
            part.write(partial)

    def write_example(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep an image and its maps for the picture at the end."""
        with new_file(self.partial / f"example-{index:08d}.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def read_examples(self) -> dict[int, dict[str, np.ndarray]]:
        """The kept examples by index."""
        examples = {}
        for path in sorted(self.partial.glob("example-*.npz")):
            with np.load(path) as arrays:
                examples[int(path.stem.split("-")[1])] = dict(arrays)
        return examples

    def read_value(self, name: str):
        """A JSON value that an earlier run kept or wrote into its results, or None."""
        kept, results = self.partial / f"{name}.json", self.folder / "results.json"
        if kept.exists():
            return json.loads(kept.read_text())
        return (read_json(results, missing_ok=True) or {}).get(name)

    def write_value(self, name: str, value) -> None:
        """Keep a JSON value."""
        write_json(self.partial / f"{name}.json", value)

    def finish(self) -> None:
        """Remove the parts, once the report holds what was in them, and what a killed run left half-written."""
        gone = self.partial.with_name(".finished")  # renamed at once: a kill in between leaves all parts or none
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.partial, gone)
        shutil.rmtree(gone)
