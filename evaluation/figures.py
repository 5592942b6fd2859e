"""The pictures of a report: example maps on one colour scale, and insertion and deletion curves."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from castream.artifacts.files import new_file

from .masking import upsample_saliency
from .settings import CURVE_METRICS

COLOUR_MAP = "inferno"  # the pipeline's overlay has it, too; perceptually even and readable with any colour vision
OPACITY = 0.7
WRONG = "✗"  # in a title, beside a pooling that predicts another class
POOLING_LINES = {"gap": "--", "source": "--", "ca": "-"}
LINE_MARKERS = ("o", "s", "^")
MASK_COLOUR = "#39d5ff"
# Okabe and Ito's colours, which stay apart with any colour vision
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASELINE_TITLES = {
    "random_map": "random map",
    "center_gaussian": "centred Gaussian",
    "uniform_map": "uniform map",
}


@dataclass
class ExampleRow:
    """One image of the picture.

    Args:
        title: what stands left of it, a few short lines.
        image: (height, width, 3), uint8.
        maps: one saliency map a column, (h, w) in [0, 1] at any resolution.
        mask: the object, (height, width) boolean, drawn as an outline.
    """

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray]
    mask: np.ndarray | None = None


def write_examples(path: str | Path, rows: Sequence[ExampleRow], columns: Sequence[str]) -> None:
    """Draw images and their maps: a row an image, a column a map, one colour scale from 0 to 1 for all.

    Args:
        columns: titles of the maps, which may hold line breaks; the input's column comes first by itself.

    Raises:
        ValueError: a row has another number of maps than there are columns.
    """
    from matplotlib.figure import Figure

    for row in rows:
        if len(row.maps) != len(columns):
            raise ValueError(f"rows has {len(row.maps)} maps for {row.title!r} but columns {len(columns)} titles.")
    aspect = rows[0].image.shape[0] / rows[0].image.shape[1]
    cell, left, top = 1.5, 1.35, 0.5  # inches
    notes = _notes(rows, width=int(15 * cell * (len(columns) + 1)))  # 15 characters an inch
    below = 0.13 * notes.count("\n")
    bottom = 0.62 + below
    width, height = left + cell * (len(columns) + 1) + 0.1, top + cell * aspect * len(rows) + bottom
    figure = Figure(figsize=(width, height), dpi=130)
    edges = {"left": left / width, "right": 1 - 0.1 / width, "top": 1 - top / height, "bottom": bottom / height}
    grid = figure.add_gridspec(len(rows), len(columns) + 1, **edges, wspace=0.04, hspace=0.04)
    for line, row in enumerate(rows):
        axes = [figure.add_subplot(grid[line, column]) for column in range(len(columns) + 1)]
        _draw_row(axes, row)
        if line == 0:
            for axis, title in zip(axes, ("input", *columns), strict=True):
                axis.set_title(title, fontsize=9, pad=4)
    share = left / width
    bar = figure.add_axes((share + 0.25 * (1 - share), (0.36 + below) / height, 0.5 * (1 - share), 0.1 / height))
    _draw_scale(figure, bar, notes)
    with new_file(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _notes(rows: Sequence[ExampleRow], width: int) -> str:
    """What stands below the picture, in lines of `width` characters."""
    notes = ["saliency, each map scaled to [0, 1]"]
    notes += ["outline: the object's mask"] if any(row.mask is not None for row in rows) else []
    notes += [f"{WRONG} another class is predicted"] if any(WRONG in row.title for row in rows) else []
    return textwrap.fill("; ".join(notes), width)


def _draw_scale(figure, bar, title: str) -> None:
    """The colour bar of all maps, as they look over a grey image."""
    from matplotlib.cm import ScalarMappable

    figure.colorbar(
        ScalarMappable(cmap=COLOUR_MAP), cax=bar, orientation="horizontal", ticks=[0, 0.25, 0.5, 0.75, 1], alpha=OPACITY
    )
    bar.tick_params(labelsize=7, length=2, pad=1)
    bar.set_xlabel(title, fontsize=8, labelpad=1)


def _draw_row(axes: Sequence, row: ExampleRow) -> None:
    """The image, and each map over its grey version."""
    height, width = row.image.shape[:2]
    grey = np.repeat(row.image.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)
    extent = (0, width, height, 0)  # maps and image share one frame, whatever their resolution
    for axis, saliency in zip(axes, (None, *row.maps), strict=True):
        axis.set_xticks([])
        axis.set_yticks([])
        axis.imshow(row.image if saliency is None else grey, extent=extent)
        if saliency is not None:
            upsampled = upsample_saliency(torch.as_tensor(saliency, dtype=torch.float32)[None], (height, width))[0]
            axis.imshow(upsampled.numpy(), cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=OPACITY, extent=extent)
        if row.mask is not None and row.mask.any() and not row.mask.all():
            axis.contour(row.mask, levels=[0.5], colors=MASK_COLOUR, linewidths=1, extent=(0, width, 0, height))
            axis.set_ylim(height, 0)
    axes[0].set_ylabel(row.title, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)


def _title(method: str) -> str:
    """Of a method of `explain`, or of a map that no model made."""
    from modeling_castream.methods_castream import METHODS  # importing the model's code takes seconds

    return METHODS[method].title if method in METHODS else BASELINE_TITLES.get(method, method)


def example_columns(methods: Sequence[str], poolings: Sequence[str]) -> list[tuple[str, str, str]]:
    """(title, method, pooling) of the paper's figure: raw attention once, then GAP | CA for each other method."""
    attention = "raw_attention" in methods or "ca" in poolings
    pooling = "ca" if "ca" in poolings else poolings[-1]
    columns = [(f"attention\n({pooling.upper()})", "raw_attention", pooling)] if attention else []
    for method in methods:
        if method != "raw_attention":
            columns += [(f"{_title(method)}\n({name.upper()})", method, name) for name in poolings]
    return columns


def _without_twins(columns: list[tuple[str, str, str]], examples: dict[int, dict]) -> list[tuple[str, str, str]]:
    """One column for a method whose maps are the same under all poolings: two would look like a finding."""
    kept, first = [], {}
    for title, method, pooling in columns:
        theirs = first.setdefault(method, pooling)
        pairs = ((arrays[f"{method}|{pooling}"], arrays[f"{method}|{theirs}"]) for arrays in examples.values())
        if theirs == pooling:
            kept.append((title, method, pooling))
        elif all(np.allclose(one, other, atol=1e-5) for one, other in pairs):
            kept[[column[1] for column in kept].index(method)] = (_title(method), method, theirs)
        else:
            kept.append((title, method, pooling))
    return kept


def write_report_examples(path: str | Path, report, columns: Sequence[tuple[str, str]] | None = None) -> None:
    """Draw a report's examples.

    Args:
        report: a `Report` with examples.
        columns: (method, pooling) of each column; None for all of the evaluation's.
    """
    settings = report.settings
    titled = _without_twins(example_columns(settings.methods, settings.poolings), report.examples)
    if columns is not None:
        titles = {(method, pooling): title for title, method, pooling in titled}
        titled = [(titles.get(key, f"{_title(key[0])}\n({key[1].upper()})"), *key) for key in columns]
    rows = [
        ExampleRow(
            str(arrays["title"]),
            arrays["image"],
            [arrays[f"{method}|{pooling}"] for _, method, pooling in titled],
            arrays.get("mask"),
        )
        for _, arrays in sorted(report.examples.items())
    ]
    write_examples(path, rows, [title for title, _, _ in titled])


def write_curves(path: str | Path, report) -> None:
    """Draw the mean insertion and deletion curves: a colour a method, solid for CA, dashed for GAP."""
    from matplotlib.figure import Figure

    names = [name for name in CURVE_METRICS if name in report.settings.metrics]
    methods = list(dict.fromkeys(row["method"] for row in report.results["rows"]))
    handles = _legend(methods, report.settings.poolings)
    columns = min(len(handles), 2 * len(names))
    lines = -(-len(handles) // columns)
    figure = Figure(figsize=(5.2 * len(names), 3.6 + 0.2 * lines), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        for method, pooling, curve in mean_curves(report.part, name):
            share = np.linspace(0, 100, len(curve))
            axis.plot(share, 100 * curve, POOLING_LINES[pooling], **_line(methods.index(method)))
        better = "higher is better" if name == "insertion" else "lower is better"
        axis.set_title(f"{name} ({better})", fontsize=10)
        axis.set_xlabel(f"most salient pixels {'inserted' if name == 'insertion' else 'deleted'} (%)", fontsize=9)
        axis.set_xlim(0, 100)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[0].set_ylim(bottom=0)  # at the end: it fixes the top of all axes, too
    axes[0].set_ylabel("mean probability of the class (%)", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    with new_file(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _line(number: int) -> dict:
    """How a method's lines look; where the colours begin again, markers tell the methods apart."""
    again = number // len(LINE_COLOURS)
    marks = {"marker": LINE_MARKERS[again - 1], "markersize": 3.5, "markevery": 2} if again else {}
    return {"color": LINE_COLOURS[number % len(LINE_COLOURS)], "linewidth": 1.6, **marks}


def _legend(methods: Sequence[str], poolings: Sequence[str]) -> list:
    """A coloured line a method, then what solid and dashed mean."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_title(method), **_line(number)) for number, method in enumerate(methods)]
    return handles + [
        Line2D([], [], color="#444444", linewidth=1.6, linestyle=POOLING_LINES[name], label=f"under {name.upper()}")
        for name in poolings
    ]


def mean_curves(part, name: str) -> list[tuple[str, str, np.ndarray]]:
    """(method, pooling, mean curve) of the plain rows of a per-image table, read a few thousand rows at a time.

    Images of several sizes have curves of several lengths: the shorter ones are read at the points of the longest.

    Args:
        part: a `Part` or `SavedPart`.
    """
    sums = {}  # (method, pooling) -> length -> (sum of the curves, their number)
    for batch in part.batches(["method", "pooling", "control", f"{name}_curve"]):
        plain = batch.filter(pc.field("control") == "")
        keys = list(zip(plain.column(0).to_pylist(), plain.column(1).to_pylist(), strict=True))
        lengths = pc.list_value_length(plain.column(3)).to_numpy(zero_copy_only=False)
        for key in dict.fromkeys(keys):
            own = np.array([other == key for other in keys])
            for length in np.unique(lengths[own]):
                curves = plain.column(3).filter(pa.array(own & (lengths == length))).flatten()
                total, count = sums.setdefault(key, {}).get(length, (np.zeros(length), 0))
                curves = curves.to_numpy().reshape(-1, length)
                sums[key][length] = total + curves.sum(0, dtype=np.float64), count + len(curves)
    means = []
    for (method, pooling), by_length in sums.items():
        points = np.linspace(0, 1, max(by_length))
        total = sum(np.interp(points, np.linspace(0, 1, length), curve) for length, (curve, _) in by_length.items())
        means.append((method, pooling, total / sum(count for _, count in by_length.values())))
    return means
