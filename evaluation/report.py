"""What an evaluation found: the per-image table, its means and intervals."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
from castream.artifacts.files import new_file, write_file, write_json

from .intervals import mean_intervals
from .markdown import to_markdown
from .settings import CONTROL_MAPS, EvaluationSettings
from .store import TABLE_NAME, Part
from .table import Row, reference_map, table_rows

PACKAGES = ("castream", "torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "pillow", "timm")
# Values whose intervals wait to be computed together: bounds memory to a few hundred MB.
MAX_HELD = 2**24
# Which rows of CA are compared with which rows of GAP.
PAIRS = (
    ("", ""),
    ("", "temperature"),
    ("norm", ""),
    ("map_only", ""),
    ("area", "area"),
    ("map_only_area", "area"),
)


@dataclass
class Report:
    """An evaluation's results.

    Args:
        settings: what was evaluated.
        part: the whole per-image table.
        results: settings, versions, sample, accuracy, rows and paired differences, as results.json holds them.
        examples: images and maps for the picture, by index.
        published: what the paper gives for this network and dataset, see `published.published_rows`.
    """

    settings: EvaluationSettings
    part: Part
    results: dict
    examples: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    published: tuple[str, dict, dict] | None = None

    @property
    def per_image(self) -> pd.DataFrame:
        """One row an image, target and row of the table."""
        return self.part.table.to_pandas()

    def markdown(self) -> str:
        """results.md."""
        return to_markdown(self.results, self.published)

    def write(self, output_dir: str | Path) -> None:
        """Write results.json, results.md, per_image.parquet, examples.png and curves.png, each whole or not at all."""
        from .figures import write_curves, write_report_examples

        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / TABLE_NAME) as partial:
            self.part.write(partial)
        write_file(folder / "results.md", self.markdown().encode())
        if self.examples:
            write_report_examples(folder / "examples.png", self)
        if "insertion" in self.settings.metrics or "deletion" in self.settings.metrics:
            write_curves(folder / "curves.png", self)
        write_json(folder / "results.json", self.results)


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def summarize(settings: EvaluationSettings, part: Part, context: dict) -> dict:
    """Means, intervals and paired intervals of a per-image table, over images.

    Args:
        context: what else belongs into the results: model, dataset, command, temperature.
    """
    frame = part.table.drop(["id", "insertion_curve", "deletion_curve"]).to_pandas()
    items = frame.drop_duplicates(["index", "target"])
    values, figures = _per_image_values(frame), _Figures(settings.seed)
    results = {
        **context,
        "settings": settings.to_dict(),
        "versions": versions(),
        "sample": {
            "images": items["index"].nunique(),
            "maps_explained": len(items),
            "images_without_label": int(items["correct"].isna().sum()),
            "skipped": part.skipped,
        },
        "accuracy": _accuracy(values, settings, figures),
        "rows": [_summarize_row(row, values, settings, figures) for row in table_rows(settings)],
        "ca_minus_gap": _pairs(values, settings, figures),
        "method_minus_reference": _against_reference(values, settings, figures),
    }
    figures.fill()
    return results


def _per_image_values(frame: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """Per-image values by method, pooling and control: an image's targets are averaged, since one image is one unit."""
    frame = frame.assign(correct=frame["correct"].astype("Float64").astype(float))
    frame[["map_area", "probability", "probability_masked", "correct"]] *= 100  # percent, as the metrics are
    # counted, where a mean over an image's targets says nothing
    counts = frame["empty_map"].astype(int)
    keys = ["method", "pooling", "control"]
    groups = frame.assign(empty_map=counts).groupby(keys, sort=False)
    return {key: group.groupby("index").mean(numeric_only=True) for key, group in groups}


class _Figures:
    """The figures of a table, whose intervals are computed many at a time: they share the draws of the images."""

    def __init__(self, seed: int):
        self.seed, self.waiting, self.held = seed, {}, 0

    def mean(self, values: pd.Series) -> dict | None:
        """Mean and interval, {"mean", "low", "high", "images"}, complete after `fill`; None without any value."""
        values = values.dropna().to_numpy(np.float64)
        if not len(values):
            return None
        entry = {"mean": None, "low": None, "high": None, "images": len(values)}
        self.waiting.setdefault(len(values), []).append((entry, values))
        self.held += len(values)
        if self.held > MAX_HELD:
            self.fill()
        return entry

    def difference(self, first: pd.Series, second: pd.Series) -> dict | None:
        """The same for first minus second, over the images that have both."""
        return self.mean(first - second)

    def fill(self) -> None:
        """Compute what waits."""
        for pairs in self.waiting.values():
            intervals = mean_intervals(np.stack([values for _, values in pairs], axis=1), seed=self.seed)
            for (entry, _), interval in zip(pairs, intervals, strict=True):
                entry.update(interval._asdict())
        self.waiting, self.held = {}, 0


def _accuracy(values: dict, settings: EvaluationSettings, figures: _Figures) -> dict:
    """Accuracy; an image with several labels counts as right if the predicted class is one of them."""
    correct = {pooling: values[settings.methods[0], pooling, ""]["correct"] for pooling in settings.poolings}
    accuracy = {pooling: figures.mean(series) for pooling, series in correct.items()}
    if len(correct) == 2:
        accuracy["ca_minus_gap"] = figures.difference(correct["ca"], correct["gap"])
    return accuracy


def _columns(settings: EvaluationSettings) -> list[str]:
    return [*settings.metrics, "map_area", "probability"]


def _summarize_row(row: Row, values: dict, settings: EvaluationSettings, figures: _Figures) -> dict:
    found = values[row.method, row.pooling, row.control]
    summary = {"method": row.method, "pooling": row.pooling, "control": row.control, "scoring": row.scoring}
    summary["metrics"] = {name: figures.mean(found[name]) for name in _columns(settings)}
    summary["images_with_empty_maps"] = int((found["empty_map"] > 0).sum())
    if "randomization" in settings.controls and row.control == "" and row.method not in CONTROL_MAPS:
        summary["randomization_correlation"] = figures.mean(found["randomization_correlation"])
    return summary


def _pairs(values: dict, settings: EvaluationSettings, figures: _Figures) -> list[dict]:
    """CA minus GAP, for each method and control that has both."""
    pairs = []
    for method in dict.fromkeys(method for method, _, _ in values):
        for ca_control, gap_control in PAIRS:
            ca, gap = values.get((method, "ca", ca_control)), values.get((method, "gap", gap_control))
            if ca is not None and gap is not None:
                metrics = _differences(ca, gap, settings, figures)
                pairs.append({"method": method, "control": ca_control or gap_control, "metrics": metrics})
    return pairs


def _against_reference(values: dict, settings: EvaluationSettings, figures: _Figures) -> list[dict]:
    """Each method minus the reference method, under the same pooling and control."""
    reference, differences = reference_map(settings)[0], []
    for (method, pooling, control), ours in values.items():
        theirs = values.get((reference, pooling, control))
        if method != reference and theirs is not None:
            entry = {"method": method, "reference": reference, "pooling": pooling, "control": control}
            differences.append(entry | {"metrics": _differences(ours, theirs, settings, figures)})
    return differences


def _differences(first: pd.DataFrame, second: pd.DataFrame, settings: EvaluationSettings, figures: _Figures) -> dict:
    return {name: figures.difference(first[name], second[name]) for name in _columns(settings)}
