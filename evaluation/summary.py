"""Means and intervals of a per-image table, over images, one column of the table in memory at a time."""

import platform
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from .intervals import mean_intervals
from .settings import CONTROL_MAPS, EvaluationSettings
from .store import Part, SavedPart
from .table import reference_map, table_rows

PACKAGES = ("castream", "torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "pillow", "timm")
# Values whose intervals wait to be computed together: bounds memory to some tens of MB.
MAX_HELD = 2**20
# Which rows of CA are compared with which rows of GAP.
PAIRS = (
    ("", ""),
    ("", "temperature"),
    ("norm", ""),
    ("bound", ""),
    ("map_only", ""),
    ("pooling_only", ""),
    ("area", "area"),
    ("map_only_area", "area"),
)


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def summarize(settings: EvaluationSettings, part: Part | SavedPart, context: dict) -> dict:
    """Means, intervals and paired intervals of a per-image table.

    Args:
        context: what else belongs into the results: model, dataset, command, temperature.
    """
    table, figures = _Table(part), _Figures(settings.seed)
    results = {
        **context,
        "settings": settings.to_dict(),
        "versions": versions(),
        "sample": table.sample() | {"skipped": part.skipped},
        "accuracy": _accuracy(table.values("correct"), settings, figures),
        "rows": _rows(settings),
        "ca_minus_gap": _pairs(table.keys, settings.own_pooling),
        "method_minus_reference": _against_reference(table.keys, settings),
    }
    for name in (*settings.metrics, "map_area", "probability"):
        _fill_metric(results, name, table.values(name), figures)
    _count_empty_maps(results["rows"], table.values("empty_map"))
    if "randomization" in settings.controls:
        values = table.values("randomization_correlation")
        for row in results["rows"]:
            if row["control"] == "" and row["method"] not in CONTROL_MAPS:
                row["randomization_correlation"] = figures.mean(values[_key(row)])
    figures.fill()
    return results


class _Table:
    """A per-image table, read column by column, by method, pooling and control."""

    def __init__(self, part: Part | SavedPart):
        self.part, self.keys, codes = part, [], []
        places = {}
        for batch in part.batches(["method", "pooling", "control"]):
            names = [column.dictionary_encode() for column in batch.columns]
            local = np.zeros(len(batch), np.int64)
            for column in names:
                local = local * len(column.dictionary) + column.indices.to_numpy()
            _, first, inverse = np.unique(local, return_index=True, return_inverse=True)
            for place in first[np.argsort(first)]:  # in the order of the table
                places.setdefault(tuple(column[place].as_py() for column in batch.columns), len(places))
            found = [places[tuple(column[place].as_py() for column in batch.columns)] for place in first]
            codes.append(np.array(found, np.int32)[inverse])
        self.keys = list(places)
        codes = np.concatenate(codes) if codes else np.zeros(0, np.int32)
        self.order = np.argsort(codes, kind="stable").astype(np.int32)  # the rows of each key, one after the other
        self.ends = np.searchsorted(codes[self.order], np.arange(len(self.keys)), side="right")

    def column(self, name: str) -> np.ndarray:
        """A column in the order of the table; booleans as 0 and 1, what is missing as NaN."""
        column = self.part.table_of([name]).column(0)
        return pc.cast(column, "float64").to_numpy() if name != "index" else column.to_numpy()

    @cached_property
    def images(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """For each key its images, and, where one has several targets, which of them each row is of."""
        known, found = np.zeros(0, np.int64), []
        for rows in np.split(self.order, self.ends[:-1]):
            index = self.column_of_index[rows]
            images, inverse = np.unique(index, return_inverse=True)
            known = images = known if np.array_equal(known, images) else images  # shared by keys of the same images
            found.append((images, None if np.array_equal(images, index) else inverse.astype(np.int32)))
        return found

    @cached_property
    def column_of_index(self) -> np.ndarray:
        """Which image each row is of."""
        return self.column("index")

    def values(self, name: str) -> dict[tuple[str, str, str], pd.Series]:
        """Per-image values by key, percent: an image's targets are averaged, since one image is one unit."""
        column = self.column(name)
        if name in ("map_area", "probability", "correct"):
            column = 100 * column
        values = {}
        for key, rows, (images, inverse) in zip(
            self.keys, np.split(self.order, self.ends[:-1]), self.images, strict=True
        ):
            own = column[rows]
            if inverse is not None:
                known = ~np.isnan(own)
                sums, counts = (np.bincount(inverse[known], weights, len(images)) for weights in (own[known], None))
                own = np.divide(sums, counts, out=np.full(len(images), np.nan), where=counts > 0)
            values[key] = pd.Series(own, index=images, copy=False)
        return values

    def sample(self) -> dict[str, int]:
        """How many images, explained classes, and images without a label there are."""
        index, target = self.column_of_index, self.column("target").astype(np.int64)
        items = np.unique(index * (target.max(initial=0) + 1) + target, return_index=True)[1]
        return {
            "images": len(np.unique(index)),
            "maps_explained": len(items),
            "images_without_label": int(np.isnan(self.column("correct")[items]).sum()),
        }


class _Figures:
    """The figures of a table, whose intervals are computed many at a time: they share the draws of the images."""

    def __init__(self, seed: int):
        self.seed, self.waiting, self.held = seed, {}, 0

    def mean(self, values: pd.Series) -> dict | None:
        """Mean and interval, {"mean", "low", "high", "images"}, complete after `fill`; None without any value."""
        values = values.dropna().to_numpy(np.float64, copy=True)
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


def _accuracy(correct: dict, settings: EvaluationSettings, figures: _Figures) -> dict:
    """Accuracy; an image with several labels counts as right if the predicted class is one of them."""
    correct = {pooling: correct[settings.methods[0], pooling, ""] for pooling in settings.poolings}
    accuracy = {pooling: figures.mean(series) for pooling, series in correct.items()}
    if len(correct) == 2:
        accuracy["ca_minus_gap"] = figures.difference(correct["ca"], correct[settings.own_pooling])
    return accuracy


def _key(row: dict) -> tuple[str, str, str]:
    return row["method"], row["pooling"], row["control"]


def _rows(settings: EvaluationSettings) -> list[dict]:
    return [
        {"method": row.method, "pooling": row.pooling, "control": row.control, "scoring": row.scoring, "metrics": {}}
        for row in table_rows(settings)
    ]


def _pairs(keys: list[tuple[str, str, str]], own: str) -> list[dict]:
    """CA minus the source's own pooling, for each method and control that has both."""
    return [
        {"method": method, "control": ca_control or gap_control, "metrics": {}}
        for method in dict.fromkeys(method for method, _, _ in keys)
        for ca_control, gap_control in PAIRS
        if {(method, "ca", ca_control), (method, own, gap_control)} <= set(keys)
    ]


def _against_reference(keys: list[tuple[str, str, str]], settings: EvaluationSettings) -> list[dict]:
    """Each method minus the reference method, under the same pooling and control."""
    reference = reference_map(settings)[0]
    return [
        {"method": method, "reference": reference, "pooling": pooling, "control": control, "metrics": {}}
        for method, pooling, control in keys
        if method != reference and (reference, pooling, control) in keys
    ]


def _fill_metric(results: dict, name: str, values: dict, figures: _Figures) -> None:
    """One metric of all rows and differences."""
    for row in results["rows"]:
        row["metrics"][name] = figures.mean(values[_key(row)])
    controls = {ca_control or gap_control: (ca_control, gap_control) for ca_control, gap_control in PAIRS}
    own = "source" if "source" in results["settings"]["poolings"] else "gap"
    for pair in results["ca_minus_gap"]:
        ca_control, gap_control = controls[pair["control"]]
        ca, gap = values[pair["method"], "ca", ca_control], values[pair["method"], own, gap_control]
        pair["metrics"][name] = figures.difference(ca, gap)
    for row in results["method_minus_reference"]:
        theirs = values[row["reference"], row["pooling"], row["control"]]
        row["metrics"][name] = figures.difference(values[_key(row)], theirs)


def _count_empty_maps(rows: list[dict], empty: dict) -> None:
    for row in rows:
        row["images_with_empty_maps"] = int((empty[_key(row)] > 0).sum())
