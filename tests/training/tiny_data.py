"""Tiny datasets on disk for the tests of training."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

CLASSES = ["red", "green", "blue"]
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES), "index": Value("int64")})


def encode(pixels: np.ndarray, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def make_row(index: int) -> dict:
    """A noisy image whose strongest colour is its class."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
    pixels[8:24, 10:30, index % 3] += 100
    return {"image": {"bytes": encode(pixels), "path": None}, "label": index % 3, "index": index}


def write_shards(
    folder: Path, split: str, sizes: list[int], broken: tuple[int, ...] = (), classes=CLASSES, labels=3
) -> None:
    """Parquet shards of the sizes given, whose rows count on; those in `broken` are cut short. `labels` differ."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = Features(FEATURES | {"label": ClassLabel(names=classes)}).arrow_schema
    index = 0
    for shard, size in enumerate(sizes):
        rows = [make_row(number) for number in range(index, index + size)]
        for row in rows:
            row["label"] = row["index"] % labels
            if row["index"] in broken:
                row["image"]["bytes"] = row["image"]["bytes"][:200]
        index += size
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"{split}-{shard:05d}.parquet", row_group_size=4)
