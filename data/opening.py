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
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from castream.data.scenes.dataset import scenes_data_files, write_scenes
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset

from .files import is_address
from .folders import Photos, Shards, check_single_file, open_folder, open_table, photos_of
from .labels import UnknownClassesError, feature_classes, find_columns
from .photos import split_of_photos
from .split import Split, count_rows, fingerprint, first_line
from .tables import TABLE_SUFFIXES

BUILDERS = ("imagefolder", "parquet", "webdataset", "csv", "json")  # names of kinds of files, for data_files

__all__ = ["Split", "UnknownClassesError", "describe_dataset", "fingerprint", "open_scenes", "open_split"]


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
            opened = split_of_photos(found, title, columns)
        else:
            opened = _open_stream(found or name, split, config, data_files, title, columns)
    except OSError as error:
        raise ValueError(f"dataset {source!r}, split {split!r} cannot be opened: {first_line(error)}") from error
    if class_names:
        opened = replace(opened, class_names=list(class_names))
    return replace(opened, stream=opened.stream.reshard()) if reshard and not opened.unsplittable else opened


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
            check_single_file(name, split)
            return Shards("parquet" if suffix == ".parquet" else "webdataset", [name])
        if suffix in TABLE_SUFFIXES:
            return open_table(name, split, label_column)
        raise ValueError(f"dataset {name!r} is a file, but no .zip, .tar, {', '.join(TABLE_SUFFIXES)}.")
    if suffix or name.startswith((".", "/")) or not name:
        raise ValueError(f"dataset {name!r} cannot be opened: it is no folder and no file.")
    if name in BUILDERS:
        raise ValueError(f"dataset {name!r} is a kind of files: name the files as data_files, or give their folder.")
    return None


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
        raise ValueError(f"dataset {title} cannot be opened: {first_line(error)}") from error


def _filled(paths: list[str]) -> list[str]:
    """The parquet files that have rows; `datasets` fails on others."""
    try:
        filled = [path for path in paths if is_address(path) or pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"the dataset cannot be opened: {first_line(error)}") from error
    if not filled:
        raise ValueError(f"the dataset has no rows in {paths[0]} and its like.")
    return filled


def _first_row(stream: IterableDataset, title: str) -> dict:
    try:
        return next(iter(stream.decode(False) if stream.features else stream))
    except StopIteration:
        raise ValueError(f"{title} has no rows.") from None
    except Exception as error:
        raise ValueError(f"{title} cannot be read: {first_line(error)}") from error


def _guess_feature(value):
    return Image() if isinstance(value, dict) and "bytes" in value else Value("string")
