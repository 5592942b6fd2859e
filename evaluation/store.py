"""The per-image table on disk: parts while a run goes on, one file at its end.

A part is a parquet file that carries the numbers of the blocks it holds, and the images that were skipped in them, in
its schema's metadata; it appears under its name whole or not at all. A killed run therefore loses at most the blocks
since its last part, and a new one reads what is there and computes the rest.
"""

import hashlib
import json
import os
import shutil
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
        metadata = json.dumps({"blocks": self.blocks, "skipped": self.skipped})
        pq.write_table(self.table.replace_schema_metadata({METADATA_KEY: metadata}), path)

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Read what `write` wrote."""
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
        return cls(table.replace_schema_metadata(None), metadata["blocks"], metadata["skipped"])


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

    def read(self) -> Part:
        """All that earlier runs finished."""
        finished = self.folder / TABLE_NAME
        paths = [finished] if finished.exists() else sorted(self.partial.glob("part-*.parquet"))
        return Part.merge([Part.read(path) for path in paths])

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
