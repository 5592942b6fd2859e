"""Labels: which column holds them, what the classes are called, and which of the model's classes they are.

Names decide. Numbers are compared only where one side has no names (`LABEL_3`, `n01440764`, `7`), or where both have as
many classes and the same names but for those that several classes share (ImageNet's cranes); and then it is said.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Features, Image
from datasets import List as ListFeature
from datasets import Sequence as SequenceFeature

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "classes", "target")
MASK_COLUMNS = ("mask", "mask.png")
BOXES_COLUMNS = ("boxes",)
ID_COLUMNS = ("id", "image_id", "__key__", "index")
UNLABELLED = -1  # what some datasets write where a label is not known


class UnknownClassesError(ValueError):
    """None of a dataset's classes is one of the model's."""


@dataclass(frozen=True)
class ClassMatch:
    """The model's class ids of a dataset's classes.

    Args:
        to_model: by the dataset's own ids; None where they are the same.
        note: what should be said about it, or "".
    """

    to_model: dict[int, int] | None = None
    note: str = ""


def normalize_name(name: str) -> str:
    """A name as it is compared: composed Unicode (a Mac's file names are decomposed), without spaces around it."""
    return unicodedata.normalize("NFC", str(name)).strip()


def match_classes(ours: Sequence[str], theirs: Sequence[str], source: str) -> ClassMatch:
    """Find a dataset's classes among a model's.

    Args:
        ours: the dataset's class names, in the order of its ids.
        theirs: the model's.
        source: the dataset's name, for messages.

    Raises:
        UnknownClassesError: where none is the model's.
        ValueError: where some are not the model's, naming them.
    """
    ours, theirs = [normalize_name(name) for name in ours], [normalize_name(name) for name in theirs]
    if ours == theirs:
        return ClassMatch()
    for key in (str, _loosely, _first_synonym):
        places = _unique_places([key(name) for name in theirs])
        if all(key(name) in places for name in ours) and len({key(name) for name in ours}) == len(ours):
            return ClassMatch({number: places[key(name)] for number, name in enumerate(ours)})
    digits = [int(name) for name in ours if name.isdecimal()]
    if len(digits) == len(ours) and max(digits) < len(theirs) and _are_codes(theirs):
        return ClassMatch(
            dict(enumerate(digits)), f"The classes of {source} are numbers, taken as the model's class ids."
        )
    places = _unique_places(theirs)
    shared = {number: places[name] for number, name in enumerate(ours) if name in places}
    nameless = _are_codes(ours) or _are_codes(theirs)
    placeholders = theirs == [f"LABEL_{number}" for number in range(len(theirs))]
    if placeholders and len(ours) <= len(theirs):
        return ClassMatch(None, _by_number_note(ours, theirs, source))
    in_place = len(ours) == len(theirs) and all(number == place for number, place in shared.items())
    if in_place and (nameless or (shared and not _contradict(ours, theirs))):
        return ClassMatch(None, _by_number_note(ours, theirs, source))
    raise _refusal(ours, theirs, shared, source)


def classes_fit(ours: Sequence[str], id2label: dict[int, str]) -> bool:
    """Whether a dataset's classes are the model's, by name or by number."""
    try:
        match_classes(ours, [id2label[index] for index in sorted(id2label)], "")
    except ValueError:
        return False
    return True


def _contradict(ours: list[str], theirs: list[str]) -> bool:
    """Whether at any place the two have different names, each of which is that of one class alone."""
    ours, theirs = [_stem(name) for name in ours], [_stem(name) for name in theirs]
    counts = Counter(ours), Counter(theirs)
    pairs = zip(ours, theirs, strict=True)
    return any(a != b and counts[0][a] == counts[1][b] == 1 for a, b in pairs)


def _by_number_note(ours: list[str], theirs: list[str], source: str) -> str:
    number = next(number for number, name in enumerate(ours) if name != theirs[number])
    return (
        f"The classes of {source} have other names than the model's ({ours[number]!r} for {theirs[number]!r}, ...) and "
        "were taken by their numbers."
    )


def _refusal(ours: list[str], theirs: list[str], shared: dict[int, int], source: str) -> ValueError:
    known = {_first_synonym(name) for name in theirs}
    unknown = [name for name in ours if _first_synonym(name) not in known]
    unknown = unknown or [name for number, name in enumerate(ours) if number not in shared]
    counts = f"{source} has {len(ours)} classes ({ours[0]}, ...), and the model {len(theirs)} ({theirs[0]}, ...)"
    if not shared:
        return UnknownClassesError(f"{counts}, and none is called alike: give them the same names.")
    listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    return ValueError(f"{counts}, but {listed} is not one of the model's: give them the same names.")


def _loosely(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).casefold()


def _first_synonym(name: str) -> str:
    return _loosely(name.partition(",")[0])


def _stem(name: str) -> str:
    """A name without other synonyms, and without what tells classes of one name apart, as in "crane (n02012849)"."""
    return _first_synonym(name.partition("(")[0].strip() or name)


def _unique_places(names: list[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: place for place, name in enumerate(names) if counts[name] == 1}


def _are_codes(names: Iterable[str]) -> bool:
    """Whether names are mere numbers, such as LABEL_3 or WordNet's n01440764."""
    return all(re.fullmatch(r"[A-Za-z]{0,6}[_ -]?\d+", name) for name in names)


def class_ids(value, class_names: dict[str, int], key: str) -> list[int]:
    """The dataset's class ids that a label says: one id or name, or a list of them; none where it is blank or -1.

    Args:
        class_names: ids by normalised names.
        key: of the row, for messages.

    Raises:
        ValueError: on what is neither.
    """
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else [value]
    ids = [_class_id(entry, class_names, key) for entry in values if entry is not None]
    ids = [number for number in ids if number != UNLABELLED]
    if len(set(ids)) < len(ids):  # zeros and ones of all classes would pass for ids
        raise ValueError(f"label {_brief(value)} of sample {key} repeats a class: give a class id, or a list of them.")
    return ids


def _class_id(entry, class_names: dict[str, int], key: str) -> int:
    entry = entry.decode() if isinstance(entry, bytes) else entry
    if isinstance(entry, str):
        name = normalize_name(entry)
        if name in class_names:
            return class_names[name]
        entry = int(name) if name.removeprefix("-").isdecimal() else entry
    if isinstance(entry, float) and entry.is_integer():
        entry = int(entry)
    if not isinstance(entry, int):
        raise ValueError(
            f"label {_brief(entry)} of sample {key} is not a class: give class ids, or name the classes as class_names."
        )
    return int(entry)


def _brief(label) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:60]}..."


def feature_classes(feature) -> tuple[list[str] | None, bool]:
    """Class names of a label's feature, None where it has none, and whether a row has several labels."""
    multi_label = isinstance(feature, (SequenceFeature, ListFeature, list))
    if multi_label:
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return (list(feature.names) if isinstance(feature, ClassLabel) else None), multi_label


def find_columns(features: Features, asked: dict[str, str | None], source: str) -> dict[str, str]:
    """The dataset's column of each role: image, label, mask, boxes, id; those that it lacks are left out.

    Args:
        asked: columns that the user names, by role.

    Raises:
        ValueError: where a named column is not there, or no column holds images.
    """
    for role, column in asked.items():
        if column and column not in features:
            raise ValueError(f"{role}_column={column!r} is not in {source}, which has {', '.join(features)}.")
    masks = [name for name in MASK_COLUMNS if name in features]
    images = [name for name, feature in features.items() if isinstance(feature, Image) and name not in masks]
    images = images or [name for name in IMAGE_COLUMNS if name in features]
    labels = [name for name in LABEL_COLUMNS if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    found = {
        "image": [name for name in IMAGE_COLUMNS if name in images] + images,
        "label": labels,
        "mask": masks,
        "boxes": [name for name in BOXES_COLUMNS if name in features],
        "id": [name for name in ID_COLUMNS if name in features],
    }
    columns = {role: asked.get(role) or (names[0] if names else None) for role, names in found.items()}
    if columns["image"] is None:
        raise ValueError(f"{source} has no image column among {', '.join(features)}: name it as image_column.")
    return {role: column for role, column in columns.items() if column is not None}
