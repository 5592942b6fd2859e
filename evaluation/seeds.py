"""One table from the evaluations of several seeds of a model.

What a table says of one trained model may be that model's luck. Here the values of an image are averaged over the
seeds, so that the intervals are those of a training run's mean over images, and each figure carries the smallest and
the largest of the seeds' own means.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
from castream.artifacts.files import read_json, write_file, write_json

from .markdown import to_markdown
from .settings import METRICS, EvaluationSettings
from .store import TABLE_NAME, Part, SavedPart
from .summary import summarize

_ROW = ["index", "target", "method", "pooling", "control"]
_VALUES = ["correct", "probability", "map_area", "empty_map", *METRICS, "randomization_correlation"]


def combine_seeds(folders: list[Path]) -> dict:
    """Results of several seeds as one, with `by_seed`, their own means, in every figure.

    Args:
        folders: each an evaluation's output, with the same settings and data.

    Raises:
        ValueError: on fewer than two of them, one that is not whole, or such as are of different images or settings.
    """
    if len(folders) < 2:
        raise ValueError("name at least two folders of results, one per seed.")
    seeds = [_read_results(folder) for folder in folders]
    for folder, results in zip(folders, seeds, strict=True):
        for name in ("settings", "dataset", "sample"):
            if results[name] != seeds[0][name]:
                raise ValueError(f"{folder} has other {name} than {folders[0]}: evaluate all seeds alike.")
    tables = [SavedPart(folder / TABLE_NAME).table_of([*_ROW, *_VALUES]).to_pandas() for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if not table[_ROW].equals(tables[0][_ROW]):
            raise ValueError(
                f"{folder} explains other images or classes than {folders[0]}: evaluate with --target label, or with "
                "gap as the first of --poolings."
            )
    values = [table[_VALUES].astype("float64") for table in tables]
    mean = pd.concat([tables[0][_ROW], sum(values) / len(values)], axis=1)
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in seeds[0]["settings"].items()
    }
    note = f"Mean over {len(seeds)} seeds (smallest to largest of the seeds' means). {seeds[0]['note']}".strip()
    context = {name: seeds[0][name] for name in ("dataset", "device", "image_processor", "temperature")}
    context |= {"model": ", ".join(results["model"] for results in seeds), "note": note}
    context |= {"command": [results["command"] for results in seeds]}
    part = Part(pa.Table.from_pandas(mean, preserve_index=False), skipped=seeds[0]["sample"]["skipped"])
    combined = summarize(EvaluationSettings(**settings), part, context)
    for name in ("accuracy", "rows", "ca_minus_gap", "method_minus_reference"):
        _add_seeds(combined[name], [results[name] for results in seeds])
    return combined


def _read_results(folder: Path) -> dict:
    results = read_json(folder / "results.json", missing_ok=True)
    if results is None or not (folder / TABLE_NAME).is_file():
        raise ValueError(
            f"{folder} has no results.json and {TABLE_NAME}: name folders that an evaluation has finished."
        )
    return results


def _add_seeds(combined, seeds: list) -> None:
    """Give each figure of nested results the seeds' own means, from results of the same form."""
    if isinstance(combined, dict) and {"mean", "low", "high", "images"} <= set(combined):
        combined["by_seed"] = [seed["mean"] for seed in seeds]
    elif isinstance(combined, dict | list):
        for key in combined if isinstance(combined, dict) else range(len(combined)):
            _add_seeds(combined[key], [seed[key] for seed in seeds])


def main(arguments: list[str] | None = None) -> int:
    """`python -m castream.evaluation.seeds`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m castream.evaluation.seeds",
        description="One table from the evaluations of several seeds of a model, with the same settings and data.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="output folders, one per seed")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for results.json and results.md")
    options = parser.parse_args(arguments)
    try:
        combined = combine_seeds(options.results)
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "results.json", combined)
        write_file(options.output / "results.md", to_markdown(combined).encode())
    except (ValueError, OSError) as error:
        print(f"evaluation: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(to_markdown(combined))
    return 0


if __name__ == "__main__":
    sys.exit(main())
