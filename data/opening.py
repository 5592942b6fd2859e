"""Opening a dataset: scenes, Hub ids, folders of images, parquet or tar shards; all by `datasets`, all streamed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from castream.data.scenes.dataset import scenes_data_files, write_scenes
from datasets import ClassLabel, Features, Image, IterableDataset, Sequence, Value, load_dataset
from datasets import List as ListFeature

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "classes", "target")
MASK_COLUMN = "mask"
UNLABELLED = -1  # what some datasets write where a label is not known


@dataclass(frozen=True)
class Split:
    """One split of a dataset, with what the trainer has to know about it.

    Args:
        stream: rows with the image still encoded: `{"bytes", "path"}`.
        image_column, label_column: names; the label's is None where there are no labels.
        class_names: in the order of the ids; None where the dataset does not tell them.
        multi_label: whether a label is a list of class ids.
        num_rows: rows of the split, None where nobody knows without reading it all.
        unsplittable: whether it is a single stream of paths, cheap to walk through.
        parquet_files: of the split, where they are on this machine.
        to_model: the model's class ids by the dataset's own; None where they are the same. `match_classes` sets it.
    """

    stream: IterableDataset
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    multi_label: bool
    num_rows: int | None
    unsplittable: bool
    parquet_files: tuple[str, ...] = ()
    to_model: dict[int, int] | None = None

    def class_ids(self, row: dict, key: str, num_labels: int | None = None) -> list[int]:
        """Class ids of a row, one unless `multi_label`.

        Args:
            key: of the row, for messages.
            num_labels: classes of the model; None: whatever the dataset says.

        Raises:
            ValueError: on a label that is no class of the dataset or the model.
        """
        value = row[self.label_column]
        values = value if self.multi_label else [value]
        ids = []
        for entry in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(entry, str) and not entry.isdigit():
                entry = self.class_names.index(entry) if entry in (self.class_names or ()) else entry
            if not isinstance(entry, int) and not str(entry).isdigit():
                raise ValueError(f"label {entry!r} of sample {key} is not a class: name the classes as class_names")
            if num_labels is not None and not 0 <= int(entry) < num_labels:
                raise ValueError(f"label {entry} of sample {key} is outside 0..{num_labels - 1}")
            if self.to_model is not None and int(entry) not in self.to_model:
                raise ValueError(f"label {entry} of sample {key} is outside 0..{len(self.to_model) - 1}")
            ids.append(int(entry) if self.to_model is None else self.to_model[int(entry)])
        return ids

    def match_classes(self, id2label: dict[int, str]) -> "Split":
        """The split with the class ids of a model, found by the names where the two order the same names differently.

        Raises:
            ValueError: where they name different numbers of different classes.
        """
        theirs = [id2label[index] for index in sorted(id2label)]
        ours = self.class_names
        if self.label_column is None or ours is None or ours == theirs:
            return self
        if set(ours) <= set(theirs) and len(set(theirs)) == len(theirs):
            return replace(self, to_model={index: theirs.index(name) for index, name in enumerate(ours)})
        if len(ours) != len(theirs):
            raise ValueError(f"the dataset has {len(ours)} classes ({ours[0]}, ...), and the model {len(theirs)}.")
        return self  # other names for the same classes, such as WordNet's ids

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
            if not (may_lack and value in (None, UNLABELLED)):
                self.class_ids({self.label_column: value}, key, num_labels)

    def _labels(self) -> Iterator[tuple[str, object]]:
        for path in self.parquet_files:
            values = pq.read_table(path, columns=[self.label_column]).column(0).to_pylist()
            yield from ((f"{Path(path).name}:{number}", value) for number, value in enumerate(values))
        if self.unsplittable and not isinstance(self.stream.features[self.label_column], ClassLabel):
            yield from ((f"0:{number}", row[self.label_column]) for number, row in enumerate(self.stream))


def open_split(args, split: str) -> Split:
    """Open one split of the run's dataset.

    Raises:
        ValueError: on a dataset, split or column that is not there, or a split without a row; in one line.
    """
    name, files = _resolve(args, split)
    try:
        available = load_dataset(name, args.dataset_config, streaming=True, **files)
    except Exception as error:  # datasets raises a dozen kinds, with the reason in the first line
        raise ValueError(f"dataset_name={args.dataset_name!r} cannot be opened: {_first_line(error)}") from error
    if split not in available:
        raise ValueError(
            f"the dataset has no split {split!r}, only {', '.join(available)}: set train_split and validation_split."
        )
    stream = available[split]
    row = _first_row(stream, args, split)
    features = stream.features or Features({key: _guess_feature(value) for key, value in row.items()})
    image_column = _image_column(features, row, args)
    label_column = _label_column(features, args)
    masks = [MASK_COLUMN] if MASK_COLUMN in features and image_column != MASK_COLUMN else []
    columns = [image_column, *([label_column] if label_column else []), *masks]
    stream = stream.select_columns(columns)
    for column in (image_column, *masks):
        stream = stream.cast_column(column, Image(decode=False))
    if args.reshard:
        stream = stream.reshard()
    row = next(iter(stream))
    names, multi_label = _classes(features, label_column)
    names = list(args.class_names) if args.class_names else names
    only_paths = row[image_column].get("bytes") is None and stream.num_shards == 1
    num_rows = _count(available, split, files, only_paths)
    parquet = tuple(path for path in files.get("data_files", {}).get(split, ()) if path.endswith(".parquet"))
    return Split(stream, image_column, label_column, names, multi_label, num_rows, only_paths, parquet)


def _resolve(args, split: str) -> tuple[str, dict]:
    """The builder's name and its files for `load_dataset`, the split's only: columns may differ."""
    if args.dataset_name is None:
        folder = write_scenes(seed=args.seed, num_train=args.scenes_train, num_validation=args.scenes_validation)
        return "parquet", {"data_files": scenes_data_files(folder)}
    folder = Path(args.dataset_name)
    if not folder.is_dir():
        if folder.suffix or args.dataset_name.startswith((".", "/", "~")):
            raise ValueError(f"dataset_name={args.dataset_name!r} is no folder.")
        return args.dataset_name, {}
    for suffix, builder in ((".parquet", "parquet"), (".tar", "webdataset")):
        files = sorted(str(path) for path in folder.rglob(f"*{suffix}"))
        if files:
            files = _of_split(files, folder, args, split)
            return builder, {"data_files": {split: _filled(files) if builder == "parquet" else files}}
    if (folder / split).is_dir():
        return "imagefolder", {"data_files": {split: str(folder / split / "**")}}
    return "imagefolder", {"data_dir": str(folder)}


def _filled(paths: list[str]) -> list[str]:
    """The parquet files that have rows; `datasets` fails on others."""
    try:
        filled = [path for path in paths if pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"the dataset cannot be opened: {_first_line(error)}") from error
    if not filled:
        raise ValueError(f"the dataset has no rows in {paths[0]} and its like.")
    return filled


def _of_split(files: list[str], folder: Path, args, split: str) -> list[str]:
    """Files of a split, told by its name in the path below the folder; all are for training where no name is found.

    Raises:
        ValueError: where files of the other split are found, and none of this one.
    """
    splits = [name for name in (args.train_split, args.validation_split) if name]
    patterns = {name: re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}") for name in splits}  # no `test` in `latest`
    found = {
        name: [file for file in files if pattern.search(str(Path(file).relative_to(folder)))]
        for name, pattern in patterns.items()
    }
    if not any(found.values()) and split == args.train_split:
        return files
    if not found[split]:
        raise ValueError(f"no file below {folder} has the split {split!r} in its name: set the name of the split.")
    return found[split]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _first_row(stream: IterableDataset, args, split: str) -> dict:
    try:
        return next(iter(stream.decode(False) if stream.features else stream))
    except StopIteration:
        raise ValueError(f"split {split!r} of the dataset {args.dataset_name or 'scenes'} has no rows.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"split {split!r} of {args.dataset_name} cannot be read: {_first_line(error)}") from error


def _guess_feature(value):
    return Image() if isinstance(value, dict) and "bytes" in value else Value("string")


def _image_column(features: Features, row: dict, args) -> str:
    if args.image_column:
        if args.image_column not in features:
            raise ValueError(
                f"image_column={args.image_column!r} is not in the dataset, which has {', '.join(features)}."
            )
        return args.image_column
    images = [name for name, feature in features.items() if isinstance(feature, Image) and name != MASK_COLUMN]
    if not images:
        raise ValueError(f"the dataset has no image column among {', '.join(features)}: name one as image_column.")
    return images[0]


def _label_column(features: Features, args) -> str | None:
    if args.label_column and args.label_column not in features:
        raise ValueError(f"label_column={args.label_column!r} is not in the dataset, which has {', '.join(features)}.")
    found = [args.label_column] if args.label_column else []
    found += [name for name in LABEL_COLUMNS if name in features]
    found += [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not found and args.objective == "cross_entropy":
        raise ValueError(
            f"objective=cross_entropy needs labels, and the dataset has only {', '.join(features)}: name label_column, "
            "or use objective=masked_distill, which needs none."
        )
    return found[0] if found else None


def _classes(features: Features, label_column: str | None) -> tuple[list[str] | None, bool]:
    """Class names, and whether there are several labels a row."""
    feature = features.get(label_column) if label_column else None
    multi_label = isinstance(feature, (Sequence, ListFeature, list))
    if multi_label:
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return (list(feature.names) if isinstance(feature, ClassLabel) else None), multi_label


def _count(available, split: str, files: dict, only_paths: bool) -> int | None:
    """Rows of a split, where that is known or cheap to find out."""
    info = available[split].info.splits
    if info and split in info and info[split].num_examples:
        return info[split].num_examples
    paths = files.get("data_files", {}).get(split, [])
    if paths and all(path.endswith(".parquet") for path in paths):
        return sum(pq.read_metadata(path).num_rows for path in paths)
    if only_paths:
        return sum(1 for _ in available[split].decode(False))
    return None
