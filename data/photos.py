"""Photos and what is known of each, as a typed table that `datasets` streams."""

import json

from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import List as ListFeature

from .folders import Photos
from .labels import LABEL_COLUMNS, MASK_COLUMNS, feature_classes, find_columns, normalize_name
from .split import ONLY_CLASS, Split


def split_of_photos(found: Photos, title: str, asked: dict[str, str]) -> Split:
    """A split of photos by their paths, which are held in memory and streamed as one shard.

    Args:
        title: for messages and reports.
        asked: columns by role, where their names are unusual.

    Raises:
        ValueError: where there is no photo, or a named column is not there.
    """
    values = {name: column for name, column in found.columns.items()}
    if not values["image"]:
        raise ValueError(f"{title} has no photo.")
    features = Features({name: _feature(name, column, found.class_names) for name, column in values.items()})
    columns = find_columns(features, asked, title)
    values = {column: _uniform(values[column], features[column]) for column in columns.values()}
    features = Features({column: features[column] for column in columns.values()})
    if found.only_class:
        values[ONLY_CLASS] = [0] * len(values[columns["image"]])
        features[ONLY_CLASS] = ClassLabel(names=[found.only_class])
    dataset = Dataset.from_dict(values, features)
    names, multi_label = (None, False)
    if "label" in columns:
        names, multi_label = feature_classes(features[columns["label"]])
        names = names or _names_in(values[columns["label"]])
    return Split(
        name=title,
        stream=dataset.to_iterable_dataset(),
        columns=columns,
        class_names=names,
        multi_label=multi_label,
        known_rows=len(dataset),
        unsplittable=True,
        only_class=found.only_class,
        unlabelled="" if "label" in columns else found.unlabelled,
        notes=tuple(found.notes) + _why_unlabelled(title, columns, found.unlabelled),
    )


def _why_unlabelled(title: str, columns: dict[str, str], why: str) -> tuple[str, ...]:
    return () if "label" in columns or not why else (f"{title} has no labels: {why}.",)


def _feature(name: str, values: list, class_names: list[str] | None):
    """The type of a column of a table."""
    if name in ("image", *MASK_COLUMNS):
        return Image(decode=False)
    if name == "label" and class_names:
        return ClassLabel(names=class_names)
    known = [value for value in values if value is not None]
    if any(isinstance(value, (list, tuple)) for value in known) and name in LABEL_COLUMNS:
        entries = [entry for value in known for entry in (value if isinstance(value, (list, tuple)) else [value])]
        return ListFeature(_feature("", entries, None))
    if known and all(isinstance(value, int) for value in known):
        return Value("int64")
    return Value("float64") if known and all(isinstance(value, (int, float)) for value in known) else Value("string")


def _uniform(values: list, feature) -> list:
    """Values as one type: what is not text becomes text in a column of texts."""
    if isinstance(feature, ListFeature):
        lists = [
            [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value] for value in values
        ]
        return [_uniform(entries, feature.feature) for entries in lists]
    if getattr(feature, "dtype", None) == "string":
        return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return values


def _names_in(labels: list) -> list[str] | None:
    """Class names in labels that are texts, sorted; None for numbers."""
    entries = [entry for label in labels for entry in (label if isinstance(label, list) else [label])]
    known = {normalize_name(entry) for entry in entries if isinstance(entry, str)}
    return sorted(known) or None
