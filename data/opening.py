"""Opening one split of a dataset, for training and evaluation alike.

    split = open_split("~/photos", "train")                      a folder of photos, of parquet or of tar shards
    split = open_split("photos.zip", "train")                    a zip of photos; a single .parquet, .csv or .tar file
    split = open_split("hf://datasets/user/name/photos", "test") any address that fsspec knows
    split = open_split("user/name", "validation", config="full") a Hub id
    split = open_split("imagefolder", "test", data_files=["photos/**"])
    split = split.match_classes(model.config.id2label)           its labels become the model's class ids
    for row in split.examples(): ...                             id, image (encoded), label, mask, boxes
    StreamLoader(split, ...)                                     batches for training, see loader.py

`folders.py` says what a folder is, `labels.py` what a label means, `decoding.py` what a pixel is. What was left out or
guessed on the way stands in `split.notes`, which a command prints.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from castream.data.scenes.dataset import scenes_data_files, write_scenes
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets import List as ListFeature

from .files import is_address, stamp
from .folders import Photos, Shards, open_folder, open_table, photos_of
from .labels import (
    LABEL_COLUMNS,
    MASK_COLUMNS,
    UNLABELLED,
    ClassMatch,
    UnknownClassesError,
    class_ids,
    feature_classes,
    find_columns,
    match_classes,
    normalize_name,
)
from .tables import TABLE_SUFFIXES

MASK_COLUMN = MASK_COLUMNS[0]
_ONLY_CLASS = "only_class"  # a column of zeros, for `match_classes` to take for labels
BUILDERS = ("imagefolder", "parquet", "webdataset", "csv", "json")  # names of kinds of files, for data_files

__all__ = ["LABEL_COLUMNS", "UNLABELLED", "Split", "UnknownClassesError", "fingerprint", "open_scenes", "open_split"]


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
        match: ClassMatch = match_classes(self.class_names, theirs, self.name)
        return replace(self, to_model=match.to_model, notes=self.notes + ((match.note,) if match.note else ()))

    def _with_only_class(self, theirs: list[str]) -> "Split":
        """A single class folder is a label where the model has that class."""
        places = [place for place, name in enumerate(theirs) if normalize_name(name) == self.only_class]
        if self.only_class is None or len(places) != 1:
            return self
        columns = self.columns | {"label": _ONLY_CLASS}
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
            identity = example.get("id", Path(path).name if path else number)
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
                reason = f"{type(error).__name__}: {_first_line(error)}"
                raise ValueError(f"{self.name} cannot be read beyond row {number}: {reason}") from error
            if row is None:
                return
            yield row
            number += 1


def open_split(
    name: str,
    split: str,
    *,
    config: str | None = None,
    data_files: Sequence[str] | None = None,
    columns: dict[str, str | None] | None = None,
    class_names: Sequence[str] | None = None,
    beside: Sequence[str | None] = (),
    reshard: bool = False,
) -> Split:
    """Open one split of a dataset as a stream.

    Args:
        name: a folder, a zip archive, a .parquet, .csv, .jsonl or .tar file, by path or address; a Hub id; or, with
            `data_files`, one of BUILDERS.
        split: its split; of a folder any folder in it.
        config: a Hub dataset's configuration.
        data_files: paths or patterns.
        columns: {"image": ..., "label": ..., "mask": ..., "boxes": ..., "id": ...}, where their names are unusual.
        class_names: names of the classes in the order of their ids, where the dataset does not tell them.
        beside: names of other splits that are used, so that files of theirs do not come into this one.
        reshard: split parquet files by row group, for more and finer shards.

    Raises:
        ValueError: on a dataset, split or column that is not there, or a split without a row; in one line.
    """
    name = _expanded(name)
    columns = {role: column for role, column in (columns or {}).items() if column}
    others = [other for other in beside if other and other != split]
    source = " ".join(data_files) if data_files else name
    title = f"{source}{f', {config}' if config else ''} ({split})"
    try:
        found = _find(name, split, data_files and [_expanded(path) for path in data_files], others, columns)
        if isinstance(found, Photos):
            opened = _open_photos(found, title, columns)
        else:
            opened = _open_stream(found or name, split, config, data_files, title, columns)
    except OSError as error:
        raise ValueError(f"dataset {source!r}, split {split!r} cannot be opened: {_first_line(error)}") from error
    if class_names:
        opened = replace(opened, class_names=list(class_names))
    return replace(opened, stream=opened.stream.reshard()) if reshard and opened.files else opened


def open_scenes(split: str, seed: int = 0, num_train: int = 2400, num_validation: int = 480) -> Split:
    """A split of the embedded scenes, which are written into the cache where they are not there."""
    folder = write_scenes(seed=seed, num_train=num_train, num_validation=num_validation)
    files = scenes_data_files(folder)
    if split not in files:
        raise ValueError(f"the scenes have no split {split!r}, only {', '.join(files)}.")
    return _open_stream(Shards("parquet", files[split]), split, None, None, f"scenes ({split})", {})


def _expanded(path: str) -> str:
    path = path if is_address(path) else os.path.expanduser(path)
    return path.rstrip("/") if len(path) > 1 else path


def _find(name: str, split: str, data_files, beside: list[str], columns: dict[str, str]) -> Photos | Shards | None:
    """Files of a split, where they are known by their paths; None for a dataset of the Hub."""
    label_column = columns.get("label")
    if data_files:
        return _find_files(name, data_files, label_column)
    suffix = Path(name).suffix.lower()
    if os.path.isdir(name) or suffix == ".zip" or (is_address(name) and suffix not in (*TABLE_SUFFIXES, ".tar")):
        return open_folder(name, split, beside, label_column)
    if is_address(name) or os.path.isfile(name):
        if suffix in (".parquet", ".tar"):
            _check_single(name, split)
            return Shards("parquet" if suffix == ".parquet" else "webdataset", [name])
        if suffix in TABLE_SUFFIXES:
            return open_table(name, split, label_column)
        raise ValueError(f"dataset {name!r} is a file, but no .zip, .tar, {', '.join(TABLE_SUFFIXES)}.")
    if suffix or name.startswith((".", "/")) or not name:
        raise ValueError(f"dataset {name!r} cannot be opened: it is no folder and no file.")
    if name in BUILDERS:
        raise ValueError(f"dataset {name!r} is a kind of files: name the files as data_files, or give their folder.")
    return None


def _check_single(path: str, split: str) -> None:
    """A single file is for training unless its name says otherwise."""
    from .folders import SPLIT_NAMES, _canonical, _names_split

    names = SPLIT_NAMES.get(_canonical(split), (split,))
    if _canonical(split) != "train" and not any(_names_split(Path(path).name, name) for name in names):
        raise ValueError(f"{path} names no split, so that all of it is 'train', and there is no {split!r}.")


def _find_files(name: str, patterns: list[str], label_column: str | None) -> Photos | Shards | None:
    """Files of a kind by their patterns; of a folder where `name` is one."""
    if name not in BUILDERS and not os.path.isdir(name):
        return None
    if os.path.isdir(name):
        patterns = [pattern if os.path.isabs(pattern) else os.path.join(name, pattern) for pattern in patterns]
    paths = [path for pattern in patterns for path in _matching(pattern)]
    if not paths:
        raise ValueError(f"data_files {' '.join(patterns)} match no file.")
    kind = name if name in BUILDERS else {".parquet": "parquet", ".tar": "webdataset"}.get(Path(paths[0]).suffix)
    if kind in ("parquet", "webdataset"):
        return Shards(kind, paths)
    if kind in ("csv", "json"):
        return open_table(paths[0], "train", label_column)
    return photos_of(paths, label_column)


def _matching(pattern: str) -> list[str]:
    if is_address(pattern):
        fs, inner = fsspec.core.url_to_fs(pattern)
        return sorted(fs.unstrip_protocol(path) for path in fs.glob(inner) if fs.isfile(path))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return sorted(os.path.abspath(path) for path in paths if os.path.isfile(path))


def _open_photos(found: Photos, title: str, asked: dict[str, str]) -> Split:
    """A single stream of paths, held in memory."""
    values = {name: column for name, column in found.columns.items()}
    if not values["image"]:
        raise ValueError(f"{title} has no photo.")
    features = Features({name: _feature(name, column, found.class_names) for name, column in values.items()})
    columns = find_columns(features, asked, title)
    values = {column: _uniform(values[column], features[column]) for column in columns.values()}
    features = Features({column: features[column] for column in columns.values()})
    if found.only_class:
        values[_ONLY_CLASS] = [0] * len(values[columns["image"]])
        features[_ONLY_CLASS] = ClassLabel(names=[found.only_class])
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


def _open_stream(
    found: Shards | str, split: str, config: str | None, data_files, title: str, asked: dict[str, str]
) -> Split:
    """A split as `datasets` streams it."""
    files = []
    if isinstance(found, Shards):
        files = _filled(found.files) if found.builder == "parquet" else found.files
        available = _load(title, found.builder, None, {split: files})
    else:
        available = _load(title, found, config, {split: list(data_files)} if data_files else None)
    if split not in available:
        raise ValueError(f"the dataset {found!r} has no split {split!r}, only {', '.join(available)}.")
    stream = available[split]
    row = _first_row(stream, title)
    known = stream.info.splits
    rows = known[split].num_examples if known and split in known and known[split].num_examples else None
    if rows is None and files and files[0].endswith(".parquet") and not any(map(is_address, files)):
        rows = count_rows(tuple(files))
    notes = tuple(found.notes) if isinstance(found, Shards) else ()
    opened = describe_stream(stream, title, asked, row)
    only_paths = isinstance(row[opened.image_column], dict) and row[opened.image_column].get("bytes") is None
    only_paths = only_paths and opened.stream.num_shards == 1
    if rows is None and only_paths:
        rows = sum(1 for _ in opened.stream)
    return replace(opened, known_rows=rows, unsplittable=only_paths, files=tuple(files), notes=notes)


def describe_stream(
    stream: IterableDataset, title: str, asked: dict[str, str] | None = None, row: dict | None = None
) -> Split:
    """A split from a stream of `datasets`, its images left encoded.

    Args:
        asked: columns by role, where their names are unusual.
        row: its first row, undecoded.

    Raises:
        ValueError: where a named column is not there, or no column holds images.
    """
    row = row or _first_row(stream, title)
    features = stream.features or Features({key: _guess_feature(value) for key, value in row.items()})
    columns = find_columns(features, asked or {}, title)
    stream = stream.select_columns(list(dict.fromkeys(columns.values())))
    for role in ("image", "mask"):
        if role in columns and (role == "image" or isinstance(features[columns[role]], Image)):
            stream = stream.cast_column(columns[role], Image(decode=False))
    names, multi_label = feature_classes(features[columns["label"]]) if "label" in columns else (None, False)
    unlabelled = (
        "" if "label" in columns else f"it has only the columns {', '.join(features)}; name one as label_column"
    )
    return Split(title, stream, columns, names, multi_label, unlabelled=unlabelled)


def describe_dataset(dataset: Dataset | IterableDataset, title: str) -> Split:
    """A split from what `datasets` has opened already, streaming or not."""
    if isinstance(dataset, IterableDataset):
        known, split = dataset.info.splits, str(dataset.split)
        rows = known[split].num_examples if known and split in known else None
        return replace(describe_stream(dataset, title), known_rows=rows)
    return replace(describe_stream(dataset.to_iterable_dataset(), title), known_rows=len(dataset))


def _load(title: str, builder: str, config: str | None, data_files: dict | None):
    try:
        return load_dataset(builder, config, streaming=True, **({"data_files": data_files} if data_files else {}))
    except Exception as error:  # datasets raises a dozen kinds, with the reason in the first line
        raise ValueError(f"dataset {title} cannot be opened: {_first_line(error)}") from error


def _filled(paths: list[str]) -> list[str]:
    """The parquet files that have rows; `datasets` fails on others."""
    try:
        filled = [path for path in paths if is_address(path) or pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"the dataset cannot be opened: {_first_line(error)}") from error
    if not filled:
        raise ValueError(f"the dataset has no rows in {paths[0]} and its like.")
    return filled


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _first_row(stream: IterableDataset, title: str) -> dict:
    try:
        return next(iter(stream.decode(False) if stream.features else stream))
    except StopIteration:
        raise ValueError(f"{title} has no rows.") from None
    except Exception as error:
        raise ValueError(f"{title} cannot be read: {_first_line(error)}") from error


def _guess_feature(value):
    return Image() if isinstance(value, dict) and "bytes" in value else Value("string")


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
                digest.update(f"{Path(path).name} {stamp(path)}\n".encode() if path else f"{value}\n".encode())
    elif split.files:
        for path in split.files:
            digest.update(f"{Path(path).name} {stamp(path)}\n".encode())
    else:
        return ""
    return digest.hexdigest()[:16]
