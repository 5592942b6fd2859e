"""Results as Markdown: results.md, and the part of it that a model card shows.

Numbers are taken over from results.json as they stand; nothing is computed here.
"""

from .intervals import Interval

ABBREVIATIONS = {
    "average_drop": "AD ↓",
    "average_gain": "AG ↑",
    "average_increase": "AI ↑",
    "kept": "kept ↑",
    "insertion": "I ↑",
    "deletion": "D ↓",
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
    "kept": "kept: share of images whose predicted class is the same when they are masked",
    "insertion": "I and D (insertion, deletion): area under the probability while the salient pixels enter or leave",
    "positive_perturbation": "positive and negative: area under the accuracy while the most (least) salient leave",
    "mask_share": "mask share: how much of a map's sum lies on the object",
    "pointing_game": "pointing: share of images whose map is largest on the object",
    "pixel_average_precision": "pixel AP: average precision of the object's pixels, ranked by the map",
    "sparsity": "sparsity: a map's largest value over its mean, no percentage",
    "map_area": "area: share of the image that the map keeps",
}
CONTROL_TITLES = {
    "": "Saliency and pooling",
    "temperature": "Control: {own} at the temperature of CA's confidence",
    "norm": "Control: CA with its pooled norm matched to GAP's",
    "bound": "Bound: an attention that is the mask itself, at GAP's norm",
    "map_only": "Control: map only, all probabilities from {own}",
    "pooling_only": "Control: pooling only, {own}'s map under both, at {own}'s norm",
    "area": "Control: maps of equal area",
    "map_only_area": "Control: map only and equal area",
}
DIFFERENCES = "CA minus {own}, paired over images"
MAX_LISTED = 20  # skipped images in results.md; results.json has all


def to_markdown(results: dict, published: tuple[str, dict, dict] | None = None) -> str:
    """results.md: the paper's table with its controls, from what `summarize` returned.

    Args:
        published: what the paper gives for this network and dataset, to stand beside.
    """
    lines = [f"# Saliency evaluation: {results['model']} on {results['dataset']}", "", *_summary(results)]
    names, own = metric_names(results), _own_pooling(results)
    for control, title in CONTROL_TITLES.items():
        rows = [row for row in results["rows"] if row["control"] == control]
        if rows:
            lines += ["", f"## {title.format(own=own)}", "", *_table(rows, names)]
            if control == "" and published is not None:
                lines += ["", *_published_lines(published, results)]
    for title, key in (
        (DIFFERENCES, "ca_minus_gap"),
        ("Method minus reference method, paired over images", "method_minus_reference"),
    ):
        if results[key]:
            lines += ["", f"## {title.format(own=own)}", "", *_table(results[key], names)]
    correlations = [row for row in results["rows"] if row.get("randomization_correlation")]
    if correlations:
        lines += ["", "## Control: rank correlation with the map after shuffling the classifier's weights", ""]
        cells = [
            [row["method"], row["pooling"].upper(), _cell(row["randomization_correlation"])] for row in correlations
        ]
        lines += _rows(["saliency", "pooling", "correlation"], cells)
    return "\n".join([*lines, "", _legend(names)]) + "\n"


def to_card_markdown(results: dict) -> str:
    """The tables of a model card: methods and control maps under both poolings, CA minus the source's own under each
    control, and the methods at equal area."""
    names = metric_names(results)
    plain = [row for row in results["rows"] if not row["control"]]
    lines = [*_summary(results), "", *_table(plain, names), "", _legend(names)]
    if results["ca_minus_gap"]:
        title = DIFFERENCES.format(own=_own_pooling(results))
        lines += ["", f"### {title}", "", *_table(results["ca_minus_gap"], names)]
    equal_area = [row for row in results["method_minus_reference"] if row["control"] == "area"]
    if equal_area:
        title = f"### Methods minus {equal_area[0]['reference']} at equal area, paired over images"
        lines += ["", title, "", *_table(equal_area, names)]
    return "\n".join(lines)


def metric_names(results: dict) -> list[str]:
    """Metrics of the tables, in order: those that any row has, and the area."""
    names = dict.fromkeys(name for row in results["rows"] for name, entry in row["metrics"].items() if entry)
    return [name for name in names if name != "probability"]


def _summary(results: dict) -> list[str]:
    return [_describe(results), "", *_accuracy_lines(results)]


def _legend(names: list[str]) -> str:
    return "; ".join(text for name, text in EXPLANATIONS.items() if name in names) + "."


def _describe(results: dict) -> str:
    settings, sample = results["settings"], results["sample"]
    sentences = [
        f"{_count(sample['images'])}, {sample['maps_explained']} explained classes, protocol `{settings['protocol']}`, "
        f"target `{settings['target']}`. Percent, mean over images [95 % interval, bootstrap over images]; area is the "
        "share of the image that the map keeps."
    ]
    if sample.get("images_without_label"):
        count = _count(sample["images_without_label"], "has no label", "have no label")
        explained = "second" if settings["target"] == "second" else "predicted"
        sentences.append(f"{count}: the {explained} class is explained.")
    if results.get("note"):
        sentences.append(results["note"])
    if sample.get("skipped"):
        listed = ", ".join(entry["id"] for entry in sample["skipped"][:MAX_LISTED])
        more = ", and those in results.json" if len(sample["skipped"]) > MAX_LISTED else ""
        one, several = (f"could not be decoded and {verb} skipped" for verb in ("was", "were"))
        sentences.append(f"{_count(len(sample['skipped']), one, several)}: {listed}{more}.")
    precision = results.get("precision") or {}
    if precision.get("correlation"):
        known = [f"{name} {value:.4f}" for name, value in precision["correlation"].items() if value is not None]
        sentences.append(
            f"The backbone ran in {precision['autocast']}; correlation with float32 over the first "
            f"{_count(precision['images'])}: {', '.join(known)}."
        )
    if results.get("temperature"):
        sentences.append(f"{_own_pooling(results)}'s confidence is CA's at temperature {results['temperature']:.4f}.")
    return " ".join(sentences)


def _count(number: int, one: str = "", several: str = "") -> str:
    return f"{number} image {one}".rstrip() if number == 1 else f"{number} images {several}".rstrip()


def _own_pooling(results: dict) -> str:
    """What titles call the source's own pooling."""
    return "source" if "source" in results["accuracy"] else "GAP"


def _accuracy_lines(results: dict) -> list[str]:
    titles = {"gap": "GAP", "source": "source", "ca": "CA", "ca_minus_gap": f"CA minus {_own_pooling(results)}"}
    known = {titles[name]: entry for name, entry in results["accuracy"].items() if entry}
    if not known:
        return ["Accuracy: unknown, the dataset has no labels."]
    return ["Accuracy: " + "; ".join(f"{title} {_cell(entry)}" for title, entry in known.items()) + "."]


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "–"
    interval = Interval(*(None if entry[name] is None else round(entry[name], 2) + 0.0 for name in Interval._fields))
    text = str(interval)  # rounded here, so that -0.004 does not become -0.00
    seeds = entry.get("by_seed")
    return f"{text} ({min(seeds) + 0.0:.2f} to {max(seeds) + 0.0:.2f})" if seeds else text


def _table(rows: list[dict], names: list[str]) -> list[str]:
    """A Markdown table: which row, then a column per metric."""
    keys = [key for key in ("method", "pooling", "control") if any(row.get(key) for row in rows)]
    header = ["saliency" if key == "method" else key for key in keys]
    header += [ABBREVIATIONS.get(name, name) for name in names]
    cells = []
    for row in rows:
        cells.append([row[key].upper() if key == "pooling" else row[key] or "none" for key in keys])
        cells[-1] += [_cell(row["metrics"].get(name)) for name in names]
    return _rows(header, cells)


def _rows(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _published_lines(published: tuple[str, dict, dict], results: dict) -> list[str]:
    """Ours beside the paper's, for the rows that both have."""
    from .published import COLUMNS

    network, accuracy, rows = published
    ours = {(row["method"], row["pooling"]): row for row in results["rows"] if row["control"] == ""}
    names = [name for name in COLUMNS if name in results["settings"]["metrics"]]
    lines = [f"Ours beside the paper's ({network}, ImageNet validation, arXiv:2404.14996), as ours / paper:", ""]
    header = ["saliency", "pooling", "accuracy", *(ABBREVIATIONS[name] for name in names)]
    table = []
    for (method, pooling), values in rows.items():
        if (method, pooling) in ours:
            found = results["accuracy"][pooling]
            cells = [f"{found['mean']:.2f} / {accuracy[pooling]:.2f}" if found else f"– / {accuracy[pooling]:.2f}"]
            metrics = ours[method, pooling]["metrics"]
            paper = dict(zip(COLUMNS, values, strict=True))
            cells += [f"{metrics[name]['mean']:.2f} / {paper[name]:.2f}" for name in names]
            table.append([method, pooling.upper(), *cells])
    return [*lines, *_rows(header, table)]
