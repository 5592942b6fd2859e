"""What the evaluation's results.json says, as the model card shows it: tables, and the entries of its model-index.

Numbers are taken over as they stand; nothing is computed here.
"""

import math

from huggingface_hub import EvalResult

POOLINGS = ("gap", "ca")
TITLES = {
    "average_drop": "AD ↓",
    "average_gain": "AG ↑",
    "average_increase": "AI ↑",
    "kept": "kept ↑",
    "insertion": "insertion ↑",
    "deletion": "deletion ↓",
    "positive_perturbation": "positive ↓",
    "negative_perturbation": "negative ↑",
    "mask_share": "mask share ↑",
    "pointing_game": "pointing ↑",
    "pixel_average_precision": "pixel AP ↑",
    "sparsity": "sparsity",
    "map_area": "area",
}
EXPLANATIONS = {
    "average_drop": "AD and AG (average drop, gain): how much of its probability the masked image loses, or gains",
    "average_increase": "AI (average increase): share of images whose probability rises",
    "kept": "kept: share of images whose predicted class stays the same when masked",
    "insertion": "insertion and deletion: area under the probability while the most salient pixels enter or leave",
    "positive_perturbation": "positive and negative: area under the accuracy while the most (least) salient leave",
    "mask_share": "mask share: how much of a map's sum lies on the object",
    "pointing_game": "pointing: share of images whose map is largest on the object",
    "pixel_average_precision": "pixel AP: average precision of the pixels, ranked by the map, against the object",
    "sparsity": "sparsity: a map's largest value over its mean, no percentage",
    "map_area": "area: share of the image that the map keeps",
}
CONTROLS = {
    "": "none",
    "temperature": "GAP at the temperature of CA's confidence",
    "norm": "CA with its pooled norm matched to GAP's",
    "map_only": "map only: all probabilities from GAP",
    "area": "maps of equal area",
    "map_only_area": "map only and equal area",
}
CONTROL_MAPS = {"random_map": "random", "center_gaussian": "centred Gaussian", "uniform_map": "uniform"}


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


def format_entry(entry: dict | None) -> str:
    """`12.54 [11.90, 13.20]`, in percent; a dash for what was not measured."""
    if entry is None:
        return "–"
    mean, low, high = (None if entry[key] is None else round(entry[key], 2) + 0.0 for key in ("mean", "low", "high"))
    # the no-break space keeps an interval on one line of a narrow column
    return f"{mean:.2f}" if low is None else f"{mean:.2f} [{low:.2f},\u00a0{high:.2f}]"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _metric_names(results: dict) -> list[str]:
    """Metrics of the table, in order: those that any row has, and the area."""
    names = dict.fromkeys(name for row in results["rows"] for name, entry in row["metrics"].items() if entry)
    return [name for name in names if name != "probability"]


def _cells(row: dict, names: list[str]) -> list[str]:
    return [format_entry(row["metrics"].get(name)) for name in names]


def accuracy_line(results: dict) -> str:
    """Top-1 accuracy under both poolings, or that it is unknown."""
    titles = {"gap": "GAP", "ca": "CA", "ca_minus_gap": "CA minus GAP"}
    known = [
        f"{title} {format_entry(results['accuracy'][key])}"
        for key, title in titles.items()
        if results["accuracy"].get(key)
    ]
    return f"Accuracy: {'; '.join(known)}." if known else "Accuracy: not measured, the dataset has no labels."


def main_table(results: dict) -> str:
    """GAP, CA and their paired difference for each method."""
    names = _metric_names(results)
    differences = {pair["method"]: pair for pair in results["ca_minus_gap"] if not pair["control"]}
    rows = []
    native = [row for row in results["rows"] if not row["control"] and row["method"] not in CONTROL_MAPS]
    for method in dict.fromkeys(row["method"] for row in native):
        rows += [[method, row["pooling"].upper(), *_cells(row, names)] for row in native if row["method"] == method]
        if method in differences:
            rows.append([method, "CA − GAP", *_cells(differences[method], names)])
    return _markdown(["saliency", "pooling", *(TITLES.get(name, name) for name in names)], rows)


def control_tables(results: dict) -> list[dict[str, str]]:
    """Title and table of each kind of control that was run; an empty list without any."""
    names = _metric_names(results)
    titles = [TITLES.get(name, name) for name in names]
    pairs = [pair for pair in results["ca_minus_gap"] if pair["method"] not in CONTROL_MAPS]
    tables = []
    if any(pair["control"] for pair in pairs):
        rows = [
            [pair["method"], CONTROLS.get(pair["control"], pair["control"]), *_cells(pair, names)] for pair in pairs
        ]
        tables.append(
            {"title": "CA minus GAP under each control", "table": _markdown(["saliency", "control", *titles], rows)}
        )
    blind = [row for row in results["rows"] if row["method"] in CONTROL_MAPS and not row["control"]]
    if blind:
        rows = [[CONTROL_MAPS[row["method"]], row["pooling"].upper(), *_cells(row, names)] for row in blind]
        tables.append(
            {"title": "Maps that know nothing of the network", "table": _markdown(["map", "pooling", *titles], rows)}
        )
    return tables


def describe_results(results: dict) -> dict:
    """What the model card's results section shows: summary, accuracy, table, legend, controls."""
    settings, sample = results["settings"], results["sample"]
    names = _metric_names(results)
    target = "labelled" if settings["target"] == "label" else "predicted"
    skipped = f" {len(sample['skipped'])} images could not be read and were skipped." if sample.get("skipped") else ""
    unlabelled = sample.get("images_without_label")
    return {
        "summary": (
            f"Measured by `python -m evaluation` on **{sample['images']} images** of {results['dataset']}, protocol "
            f"`{settings['protocol']}`, explaining the {target} class."
            + (f" {unlabelled} images have no label: there the predicted class is explained." if unlabelled else "")
            + skipped
        ),
        "accuracy": accuracy_line(results),
        "table": main_table(results),
        "legend": (
            "Percent; in brackets the 95 % bootstrap interval over images, for CA − GAP paired by image. "
            + "; ".join(text for name, text in EXPLANATIONS.items() if name in names)
            + ". `results.json` holds all settings and versions."
        ),
        "controls": control_tables(results),
    }


def to_eval_results(results: dict) -> list[EvalResult]:
    """The model-index entries: accuracy, and every figure of a method under GAP or CA; no control, no difference."""
    figures = [("accuracy", pooling.upper(), results["accuracy"].get(pooling)) for pooling in POOLINGS]
    for row in results["rows"]:
        if not row["control"] and row["method"] not in CONTROL_MAPS:
            where = f"{row['method']}, {row['pooling'].upper()}"
            figures += [
                (name, where, entry) for name, entry in row["metrics"].items() if name in TITLES and name != "map_area"
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
