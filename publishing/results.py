"""What the evaluation's results.json says, as the model card shows it: tables, and the entries of its model-index.

Numbers are taken over as they stand; nothing is computed here.
"""

import math
from dataclasses import dataclass

from huggingface_hub import EvalResult

TITLES = {
    "accuracy": "accuracy ↑",
    "average_drop": "AD ↓",
    "average_gain": "AG ↑",
    "average_increase": "AI ↑",
    "insertion": "insertion ↑",
    "deletion": "deletion ↓",
}
EXPLANATIONS = {
    "average_drop": "AD and AG (average drop, gain): how much of its probability the masked image loses, or gains",
    "average_increase": "AI (average increase): share of images whose probability rises",
    "insertion": "insertion and deletion: area under the probability while the most salient pixels enter or leave",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured under one method, pooling and control.

    Args:
        method: saliency method, or None for a figure that depends on none (accuracy).
        pooling: `"gap"`, `"ca"`, or the name of a comparison such as `"ca - gap"`.
        control: name of the control, or None for the native figure.
        metrics: metric name -> {"mean": percent, "low": percent or None, "high": percent or None}.
    """

    method: str | None
    pooling: str
    control: str | None
    metrics: dict[str, dict[str, float | None]]


def read_rows(results: dict) -> list[Row]:
    """All measured figures of a results.json, in its order.

    Raises:
        ValueError: where it is not the results.json of `python -m evaluation`.
    """
    try:
        rows = [
            Row(row.get("method"), row["pooling"], row.get("control"), dict(row["metrics"])) for row in results["rows"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results.json does not read as one of `python -m evaluation` ({error!r}): evaluate again."
        ) from None
    for row in rows:
        bad = [name for name, value in row.metrics.items() if not math.isfinite(value["mean"])]
        if bad:
            raise ValueError(f"results.json holds a {bad[0]} that is no number ({row.method}, {row.pooling}).")
    return rows


def format_value(value: dict[str, float | None] | None) -> str:
    """`12.54 [11.90, 13.20]`, in percent; an empty cell for what was not measured."""
    if value is None:
        return ""
    text = f"{value['mean']:.2f}"
    return text if value.get("low") is None else f"{text} [{value['low']:.2f}, {value['high']:.2f}]"


def markdown_table(rows: list[Row]) -> str:
    """A table of rows, one column a metric that any of them has."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    leading = ["saliency", "pooling"] + (["control"] if any(row.control for row in rows) else [])
    lines = [leading + [TITLES.get(name, name.replace("_", " ")) for name in metrics], ["---"] * len(leading + metrics)]
    for row in rows:
        cells = [row.method or "", row.pooling.upper()] + ([row.control or ""] if len(leading) > 2 else [])
        lines.append(cells + [format_value(row.metrics.get(name)) for name in metrics])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe_results(results: dict) -> dict[str, str]:
    """The texts of the model card's results section: summary, table, legend, controls_note, controls."""
    rows = read_rows(results)
    native, controls = [row for row in rows if not row.control], [row for row in rows if row.control]
    settings = results["settings"]
    names = {name for row in rows for name in row.metrics}
    return {
        "summary": (
            f"Measured by `python -m evaluation` on **{results['sample_size']} images** of {results['dataset']}, split "
            f"{results['split']}, protocol `{settings['protocol']}`, explaining the {settings['target']} class."
        ),
        "table": markdown_table(native),
        "legend": (
            "Percent; in brackets the 95 % bootstrap interval over images, for CA minus GAP paired by image. "
            + "; ".join(text for name, text in EXPLANATIONS.items() if name in names)
            + ". `results.json` holds all settings and versions."
        ),
        "controls": markdown_table(controls) if controls else "",
        "controls_note": (
            "Confidence and the area of a map move these figures by themselves. The controls show by how much: "
            "a difference between GAP and CA that a control reaches without attention is not evidence for attention."
        ),
    }


def to_eval_results(results: dict) -> list[EvalResult]:
    """The model-index entries: every native figure of a pooling, none of a control or of a difference."""
    entries = []
    for row in read_rows(results):
        if row.control or row.pooling not in ("gap", "ca"):
            continue
        for name, value in row.metrics.items():
            where = ", ".join(part for part in (row.method, row.pooling.upper()) if part)
            entries.append(
                EvalResult(
                    task_type="image-classification",
                    task_name="Image Classification",
                    dataset_type=results["dataset"],
                    dataset_name=results["dataset"],
                    dataset_split=results["split"],
                    metric_type=name,
                    metric_name=f"{name} ({where})",
                    metric_value=float(value["mean"]),
                )
            )
    return entries
