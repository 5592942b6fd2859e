"""The evaluation's results.json, checked, and as the entries of a model card's model-index."""

import math

from castream.evaluation.markdown import ABBREVIATIONS
from castream.evaluation.settings import CONTROL_MAPS, POOLINGS
from huggingface_hub import EvalResult


def check_results(results: dict) -> None:
    """Refuse what is not the content of the evaluation's results.json.

    Raises:
        ValueError: saying what is missing, or which figure is no number.
    """
    missing = [
        name
        for name in ("model", "dataset", "settings", "sample", "accuracy", "rows", "ca_minus_gap")
        if name not in results
    ]
    if missing:
        raise ValueError(
            f"results.json lacks {', '.join(missing)}: it is not one that this version of `python -m evaluation` wrote."
        )
    try:
        entries = [entry for row in (*results["rows"], *results["ca_minus_gap"]) for entry in row["metrics"].values()]
        entries += results["accuracy"].values()
        numbers = [
            entry[key] for entry in entries if entry for key in ("mean", "low", "high") if entry[key] is not None
        ]
        broken = [number for number in numbers if not math.isfinite(number)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results.json has a row that cannot be read ({error!r}): evaluate again.") from None
    if broken:
        raise ValueError(f"results.json holds {len(broken)} figures that are no numbers ({broken[0]}): evaluate again.")


def to_eval_results(results: dict) -> list[EvalResult]:
    """The model-index entries: accuracy, and every figure of a method under GAP or CA; no control, no difference."""
    figures = [("accuracy", pooling.upper(), results["accuracy"].get(pooling)) for pooling in POOLINGS]
    for row in results["rows"]:
        if not row["control"] and row["method"] not in CONTROL_MAPS:
            where = f"{row['method']}, {row['pooling'].upper()}"
            figures += [
                (name, where, entry)
                for name, entry in row["metrics"].items()
                if name in ABBREVIATIONS and name != "map_area"
            ]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=results["dataset"],
            dataset_name=results["dataset"],
            metric_type=name,
            metric_name=f"{name} ({where})",
            metric_value=float(entry["mean"]),
        )
        for name, where, entry in figures
        if entry is not None
    ]
