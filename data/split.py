"""A split of a dataset that is open: its rows, the classes of its labels, its size and a fingerprint of its files."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, IterableDataset

from .files import file_name, is_address, stamp
from .labels import class_ids, match_classes, normalize_name

ONLY_CLASS = "only_class"  # a column of zeros, for `match_classes` to take for labels


@dataclass(frozen=True)
class Split:
    """One split of a dataset, and what is known about it.

    Args:
        name: for messages and reports, with the split's.
        stream: rows with the images still encoded: `{"bytes", "path"}`.
        columns: the dataset's column of each role, "image" and whichever there are of "label", "mask", "boxes", "id".
        class_names: in the order of the ids; None where the dataset does not tell them.
        multi_label: whether a label is a list of class ids.
        known_rows: rows of the split, None where nobody has said; see `num_rows`.
        unsplittable: whether it is a single stream of paths, cheap to walk through.
        files: of the split, parquet or tar, in the order of the shards.
        to_model: the model's class ids by the dataset's own; None where they are the same. `match_classes` sets it.
        only_class: the one folder that all photos lie in, where that is no label.
        unlabelled: why there are no labels, or "".
        notes: sentences on what was left out or guessed.
    """

    name: str
    stream: IterableDataset
    columns: dict[str, str]
    class_names: list[str] | None = None
    multi_label: bool = False
    known_rows: int | None = None
    unsplittable: bool = False
    files: tuple[str, ...] = ()
    to_model: dict[int, int] | None = None
    only_class: str | None = None
    unlabelled: str = ""
    notes: tuple[str, ...] = ()

    @property
    def image_column(self) -> str:
        """The column of the images."""
        return self.columns["image"]

    @property
    def label_column(self) -> str | None:
        """The column of the labels, None where there are none."""
        return self.columns.get("label")

    @property
    def has_masks(self) -> bool:
        """Whether the objects' masks are known."""
        return "mask" in self.columns

    @property
    def num_rows(self) -> int | None:
        """Rows of the split; None where counting would take a download."""
        if self.known_rows is not None or not self.files or any(map(is_address, self.files)):
            return self.known_rows
        return count_rows(self.files)

    def without_labels(self, why: str = "") -> "Split":
        """The split as one without labels; `why` becomes a note."""
        columns = {role: column for role, column in self.columns.items() if role != "label"}
        notes = (*self.notes, why) if why else self.notes
        return replace(self, columns=columns, class_names=None, multi_label=False, notes=notes)

    def require_labels(self, what: str, remedy: str) -> None:
        """Refuse a split without labels.

        Args:
            what: what needs them, such as "objective=cross_entropy".
            remedy: what may be done instead.

        Raises:
            ValueError: saying why there are none.
        """
        if self.label_column is None:
            why = self.unlabelled or f"it has only {', '.join(self.stream.column_names)}"
            raise ValueError(f"{what} needs labels, and {self.name} has none: {why}; {remedy}.")

    @cached_property
    def _ids_by_name(self) -> dict[str, int]:
        return {normalize_name(name): number for number, name in reversed([*enumerate(self.class_names or ())])}

    def row_name(self, row: dict, key: str) -> str:
        """What a person calls a row: the file of its image, or its place in the file that it came from.

        Args:
            key: shard and number, `"3:14"`.
        """
        image = row.get(self.image_column)
        if isinstance(image, dict) and image.get("path"):
            return image["path"]
        shard, _, number = key.partition(":")
        if len(self.files) == self.stream.num_shards and number:
            return f"{Path(self.files[int(shard)]).name}:{number}"
        return key

    def class_ids(self, row: dict, key: str, num_labels: int | None = None) -> list[int]:
        """Class ids of a row, one unless `multi_label`.

        Args:
            key: of the row, for messages.
            num_labels: classes of the model; None: whatever the dataset says.

        Raises:
            ValueError: on a label that is no class of the dataset or the model, and where there is none.
        """
        value = row[self.label_column]
        ids = self._known_ids(value, key, num_labels)
        if not ids and not self.multi_label:
            raise ValueError(f"label {value!r} of sample {key} is none: leave that row out, or train without labels.")
        return ids

    def _known_ids(self, value, key: str, num_labels: int | None) -> list[int]:
        ids = class_ids(value, self._ids_by_name, key)
        for number in ids:
            if num_labels is not None and not 0 <= number < num_labels:
                raise ValueError(f"label {number} of sample {key} is outside 0..{num_labels - 1}")
            if self.to_model is not None and number not in self.to_model:
                raise ValueError(f"label {number} of sample {key} is outside 0..{len(self.to_model) - 1}")
        return ids if self.to_model is None else [self.to_model[number] for number in ids]

    def match_classes(self, id2label: dict[int, str]) -> "Split":
        """The split with the class ids of a model, found by the names.

        Raises:
            UnknownClassesError: where none of its classes is the model's.
            ValueError: where some are not, naming them.
        """
        theirs = [id2label[index] for index in sorted(id2label)]
        if self.label_column is None:
            return self._with_only_class(theirs)
        if self.class_names is None:
            if getattr(self._label_feature, "dtype", None) in ("string", "large_string"):
                return replace(self, class_names=theirs)
            note = f"{self.name} names no classes: its labels were taken as the model's class ids."
            return replace(self, notes=(*self.notes, note))
        match = match_classes(self.class_names, theirs, self.name)
        return replace(self, to_model=match.to_model, notes=self.notes + ((match.note,) if match.note else ()))

    def _with_only_class(self, theirs: list[str]) -> "Split":
        """A single class folder is a label where the model has that class."""
        places = [place for place, name in enumerate(theirs) if normalize_name(name) == self.only_class]
        if self.only_class is None or len(places) != 1:
            return self
        columns = self.columns | {"label": ONLY_CLASS}
        return replace(self, columns=columns, class_names=[self.only_class], to_model={0: places[0]})

    @property
    def _label_feature(self):
        feature = self.stream.features[self.label_column]
        return getattr(feature, "feature", feature)

    def check_labels(self, num_labels: int, may_lack: bool = False) -> None:
        """Look at every label, where that takes seconds: those of other sources are checked as they are read.

        Args:
            may_lack: whether a row may have no label.

        Raises:
            ValueError: on a label that is no class of the model, naming its row.
        """
        if self.label_column is None:
            return
        for key, value in self._labels():
            ids = self._known_ids(value, key, num_labels)
            if not ids and not may_lack:
                self.class_ids({self.label_column: value}, key, num_labels)

    def _labels(self) -> Iterator[tuple[str, object]]:
        for path in self.files:
            if path.endswith(".parquet") and not is_address(path):
                values = pq.read_table(path, columns=[self.label_column]).column(0).to_pylist()
                yield from ((f"{Path(path).name}:{number}", value) for number, value in enumerate(values))
        if self.unsplittable and not isinstance(self._label_feature, ClassLabel):
            for number, row in enumerate(self.stream):
                yield self.row_name(row, f"0:{number}"), row[self.label_column]

    def examples(self) -> Iterator[dict]:
        """Rows {"id", "image", "label", "mask", "boxes"} in order; images and masks stay encoded.

        The label is a list of class ids, the boxes a list of [x0, y0, x1, y1] in pixels; None where not known.

        Raises:
            ValueError: where the data cannot be read to its end, or a label is none.
        """
        for number, row in enumerate(self._rows()):
            example = {role: row[column] for role, column in self.columns.items()}
            path = example["image"].get("path") if isinstance(example["image"], dict) else None
            identity = example.get("id", file_name(path) if path else number)
            ids = None
            if self.label_column:
                ids = self._known_ids(example["label"], str(identity), None) or None
            boxes = example.get("boxes")
            boxes = json.loads(boxes) if isinstance(boxes, str) else boxes
            yield {"id": identity, "image": example["image"], "label": ids, "mask": example.get("mask"), "boxes": boxes}

    def _rows(self) -> Iterator[dict]:
        rows, number = iter(self.stream), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # every format's reader raises errors of its own
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(f"{self.name} cannot be read beyond row {number}: {reason}") from error
            if row is None:
                return
            yield row
            number += 1


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=16)
def count_rows(files: tuple[str, ...]) -> int | None:
    """Rows of parquet or tar files on this machine, without decoding an image; None where they cannot be counted."""
    try:
        return sum(
            pq.read_metadata(path).num_rows if path.endswith(".parquet") else _count_keys(path) for path in files
        )
    except (OSError, tarfile.TarError, pa.ArrowInvalid):  # reading it, later, says what is wrong with it
        return None


def _count_keys(path: str) -> int:
    """Samples of a webdataset shard: files side by side that share their name up to its first dot."""
    count, last = 0, None
    with tarfile.open(path) as archive:
        for entry in archive:
            folder, _, name = entry.name.rpartition("/")
            key = folder, name.partition(".")[0]
            if entry.isfile() and name and not name.startswith(".") and key != last:
                count, last = count + 1, key
    return count


def fingerprint(split: Split) -> str:
    """A digest of a split's files by name, size and time, and of its labels; "" where nobody tells them.

    It changes where a photo is exchanged under its name or a label mended in place.
    """
    digest = hashlib.sha256()
    if split.unsplittable:
        for row in split.stream:
            for value in row.values():
                path = value.get("path") if isinstance(value, dict) else None
                digest.update(f"{file_name(path)} {stamp(path)}\n".encode() if path else f"{value}\n".encode())
    elif split.files:
        for path in split.files:
            digest.update(f"{Path(path).name} {stamp(path)}\n".encode())
    else:
        return ""
    return digest.hexdigest()[:16]
