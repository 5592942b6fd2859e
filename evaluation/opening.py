"""Open a classification dataset by name, as a stream, and know its size where that is cheap to find out."""

import tarfile
from pathlib import Path

import pyarrow.parquet as pq

from .data import Examples, read_examples


def open_dataset(
    name: str,
    split: str,
    data_files: list[str] | None = None,
    config_name: str | None = None,
    columns: dict[str, str] | None = None,
    label2id: dict[str, int] | None = None,
) -> Examples:
    """Stream a classification dataset: a Hub id, a folder of images, parquet or webdataset files, or a builder's name.

    Args:
        name: as `datasets.load_dataset` takes it.
        split: its split; of a folder on this machine any folder in it.
        data_files: paths or patterns, for a builder such as "imagefolder", "parquet" or "webdataset".
        config_name: the dataset's configuration.
        columns: names of the columns, {"image": ..., "label": ..., "mask": ..., "id": ...}, where they are unusual.
        label2id: the model's class names; used where the dataset has the same names in another order.

    Raises:
        ValueError: the dataset, split or column does not exist, or its classes are not the model's.
    """
    try:
        try:
            builder, dataset = _stream(name, split, data_files, config_name)
        except ValueError:
            if data_files or not (Path(name) / split).is_dir():
                raise
            # `datasets` finds the usual splits by their names only, not PHOTOS/heldout
            builder, dataset = _stream(name, split, [f"{split}/**"], config_name)
    except (ValueError, OSError, ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"dataset {name!r}, split {split!r} cannot be opened: {reason}") from None
    source = " ".join(data_files) if data_files else name
    title = f"{source}{f', {config_name}' if config_name else ''} ({split})"
    examples = read_examples(dataset, title, columns, label2id)
    if examples.total is None:
        files = (builder.config.data_files or {}).get(split, [])
        examples.total = count_rows(builder.name, [str(path) for path in files], dataset)
    return examples


def _stream(name: str, split: str, data_files: list[str] | None, config_name: str | None) -> tuple:
    """A dataset's builder and the stream of its split."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name, config_name, **({"data_files": {split: data_files}} if data_files else {}))
    return builder, builder.as_streaming_dataset(split=split)


def count_rows(kind: str, files: list[str], dataset) -> int | None:
    """Rows of files on this machine, without decoding an image; None where counting would take a download.

    Args:
        kind: "imagefolder", "parquet" or "webdataset".
        dataset: the stream over `files`.
    """
    if not files or not all(Path(path).is_file() for path in files):
        return None
    try:
        if kind == "parquet":
            return sum(pq.read_metadata(path).num_rows for path in files)
        if kind == "webdataset":
            return sum(_count_keys(path) for path in files)
        if kind == "imagefolder":
            return sum(1 for _ in dataset.decode(False))  # paths: no image is read
    except Exception:  # a damaged file: reading it, later, says what is wrong with it
        return None
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
