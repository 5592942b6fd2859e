"""The table of a long evaluation: merged on disk, summarised column by column."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from castream.evaluation import EvaluationSettings
from castream.evaluation.figures import mean_curves
from castream.evaluation.store import SCHEMA, Part, SavedPart, merge_files
from castream.evaluation.summary import summarize

ROOT = Path(__file__).parents[2]
SETTINGS = EvaluationSettings(methods=("grad_cam", "layer_cam"), metrics=("average_drop", "insertion"))


def rows_of(index: int, targets: int = 1) -> list[dict]:
    return [
        {
            "index": index,
            "id": f"image-{index}",
            "target": target,
            "predicted": 0,
            "correct": None if index % 5 == 4 else index % 3 == 0,
            "method": method,
            "pooling": pooling,
            "control": "",
            "scoring": pooling,
            "probability": (index * 7 + place) % 11 / 11,
            "map_area": 0.25,
            "empty_map": index % 4 == 0,
            "average_drop": (index * 5 + place + target) % 13,
            "insertion": None if index == 2 else index % 7,
            "insertion_curve": [0.0, index / 64, 1.0],
        }
        for place, (method, pooling) in enumerate((m, p) for m in SETTINGS.methods for p in SETTINGS.poolings)
        for target in range(targets)
    ]


def part_of(blocks: list[int], size: int = 4) -> Part:
    """Blocks of four images, of which one has two targets and the last one of each block was skipped."""
    return Part.merge(
        [
            Part.of_block(
                block,
                [
                    row
                    for index in range(block * size, block * size + 3)
                    for row in rows_of(index, 1 + (index % 10 == 0))
                ],
                [{"index": block * size + 3, "id": "bad", "reason": "cut off"}],
            )
            for block in blocks
        ]
    )


def test_parts_of_several_processes_become_one_table_on_disk(tmp_path, monkeypatch):
    """Blocks of two processes lie between one another; a window of the merge ends within a part."""
    monkeypatch.setattr("castream.evaluation.store.IMAGES_PER_MERGE", 7)
    parts = [part_of([0, 2, 4]), part_of([1, 3]), part_of([6, 8]), part_of([5, 7, 9])]
    for number, part in enumerate(parts):
        part.write(tmp_path / f"{number}.parquet")
    merge_files([SavedPart(tmp_path / f"{number}.parquet") for number in range(4)], tmp_path / "whole.parquet")
    whole, expected = SavedPart(tmp_path / "whole.parquet"), part_of(list(range(10)))
    assert whole.table.equals(expected.table)
    assert (whole.blocks, whole.skipped) == (expected.blocks, expected.skipped)
    assert whole.indices().tolist() == [index for index in range(40) if index % 4 != 3]
    context = {"model": "m", "dataset": "d"}
    assert summarize(SETTINGS, whole, context) == summarize(SETTINGS, expected, context)
    for one, other in zip(mean_curves(whole, "insertion"), mean_curves(expected, "insertion"), strict=True):
        assert one[:2] == other[:2] and one[2].tolist() == other[2].tolist()


def test_a_table_of_before_a_metric_was_known_is_read(tmp_path):
    part = part_of([0])
    old = Part(part.table.drop(["kept"]), part.blocks)
    metadata = {b"castream": json.dumps({"blocks": [0], "skipped": []})}
    pa.parquet.write_table(old.table.replace_schema_metadata(metadata), tmp_path / "old.parquet")
    merge_files([SavedPart(tmp_path / "old.parquet")], tmp_path / "new.parquet")
    for name in ("old.parquet", "new.parquet"):
        table = SavedPart(tmp_path / name).table
        assert sorted(table.column_names) == sorted(SCHEMA.names) and table.column("kept").null_count == len(table)


SIMULATION = """
import sys, threading, time
from pathlib import Path
import numpy as np, psutil, pyarrow as pa
from castream.evaluation import EvaluationSettings
from castream.evaluation.figures import mean_curves
from castream.evaluation.store import SCHEMA, Part, Store
from castream.evaluation.summary import summarize
from castream.evaluation.table import table_rows
from castream.evaluation.settings import CONTROLS, METRICS

images, folder = int(sys.argv[1]), Path(sys.argv[2])
settings = EvaluationSettings(metrics=METRICS, controls=CONTROLS)
rows, rng, store = table_rows(settings), np.random.default_rng(0), Store(folder, {})
store.claim()
peak, process = 0, psutil.Process()
base = process.memory_info().rss

def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss - base)
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()

def part(block, size):
    index = np.repeat(np.arange(block * size, (block + 1) * size), len(rows))
    columns = {}
    for field in SCHEMA:
        if field.type == pa.float64():
            columns[field.name] = rng.random(len(index))
        elif field.type == pa.bool_():
            columns[field.name] = rng.random(len(index)) > 0.5
        elif pa.types.is_list(field.type):
            curve = pa.array(rng.random(29 * len(index), dtype=np.float32))
            ends = pa.array(np.arange(len(index) + 1, dtype=np.int32) * 29)
            columns[field.name] = pa.ListArray.from_arrays(ends, curve)
        elif field.name in ("method", "pooling", "control", "scoring"):
            columns[field.name] = [getattr(row, field.name) for row in rows] * size
        else:
            columns[field.name] = {"index": index, "id": index.astype(str)}.get(field.name, np.zeros(len(index), int))
    return Part(pa.table(columns, schema=SCHEMA), [block])

for block in range(images // 500):
    store.write_part(part(block, 500))
store.merge()
whole = store.read()
results = summarize(settings, whole, {})
mean_curves(whole, "insertion")
assert results["sample"]["images"] == images and results["rows"][0]["metrics"]["insertion"]["images"] == images
print(len(rows), peak / 2**20)
"""


@pytest.mark.slow
def test_a_long_table_stays_on_disk(tmp_path):
    """All controls and metrics of three methods: 51 rows for each of 50,000 images in less than 300 MB."""
    command = [sys.executable, "-c", SIMULATION, "50000", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    rows, growth = run.stdout.split()
    assert int(rows) == 51 and float(growth) < 286
