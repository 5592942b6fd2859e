"""Examples to evaluate on: any classification dataset, streamed, and its images as the network sees them.

A row of a dataset becomes {"id", "image", "label", "mask"}, still encoded; it is decoded only by the process whose turn
it is. An image that cannot be decoded is skipped and its id kept, so that one bad file does not end a long run.
"""

import io
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .perturbation import normalize_images

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "cls")
MASK_NAMES = ("mask",)
ID_NAMES = ("id", "image_id", "__key__", "index")


@dataclass
class Examples:
    """An iterable of rows {"id", "image", "label", "mask"} and what is known about it.

    Args:
        rows: yields the rows; a second iteration starts again, unless it is an iterator.
        name: for reports.
        total: number of rows, None if unknown.
        columns: the dataset's column of each role, {"image": ...}; none for rows that come under our names.
        note: a sentence for the report, or "".
    """

    rows: Iterable[dict]
    name: str = "examples"
    total: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)


@dataclass
class Block:
    """Images that are evaluated together, preprocessed, and what was left out.

    `images` is (batch_size, num_channels, height, width) in [0, 1], `pixel_values` the same normalised, `labels` one
    list of class ids an image (empty: none known), `masks` boolean (height, width) or None.
    """

    number: int
    indices: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    masks: list[torch.Tensor | None] = field(default_factory=list)
    images: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    skipped: list[dict] = field(default_factory=list)


class Preprocessor:
    """An image processor, and the affine map between its output and pixel space.

    The map is measured on a black and a white image rather than read from the processor's attributes, so that every
    processor works whose normalisation is one scale and one offset a channel, whatever it calls them.
    """

    def __init__(self, image_processor):
        self.image_processor = image_processor
        black, white = (self._process([Image.new("RGB", (256, 256), (v, v, v))])[0] for v in (0, 255))
        self.size = tuple(black.shape[1:])
        row, column = black.shape[1] // 2, black.shape[2] // 2
        low, high = black[:, row, column], white[:, row, column]
        self.std = (1 / (high - low)).tolist()
        self.mean = (-low / (high - low)).tolist()

    def _process(self, images: list[Image.Image]) -> list[torch.Tensor]:
        pixel_values = [self.image_processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
        return [torch.as_tensor(value, dtype=torch.float32) for value in pixel_values]

    def normalized(self, images: list[Image.Image]) -> torch.Tensor:
        """The network's input, (batch_size, num_channels, height, width)."""
        processed = self._process(images)
        shapes = {tuple(image.shape) for image in processed}
        if len(shapes) > 1:
            raise ValueError(
                f"image_processor returns images of different sizes {sorted(shapes)}: let it resize or crop to one."
            )
        # as the backbone wants it, and as whatever is computed from these images stays
        return torch.stack(processed).contiguous(memory_format=torch.channels_last)

    def to_pixel_space(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The same images in [0, 1]."""
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return (pixel_values * std + mean).clamp(0, 1)

    def describe(self) -> dict:
        """For the report: whose, the size of the network's input, (height, width), and its scale and offset."""
        size = list(self.size)
        return {"name": type(self.image_processor).__name__, "size": size, "mean": self.mean, "std": self.std}

    def mask(self, mask: Image.Image) -> torch.Tensor:
        """A mask (height, width), boolean, resized and cropped as its image is."""
        processed = self.to_pixel_space(self.normalized([mask.convert("RGB")]))
        return processed[0].mean(0) > 0.5


def read_examples(
    dataset, name: str | None = None, columns: dict[str, str] | None = None, label2id: dict[str, int] | None = None
) -> Examples:
    """Examples of a `datasets` dataset, streaming or not, or of any iterable of dictionaries.

    Args:
        name: for the report.
        columns, label2id: as for `opening.open_dataset`.

    Raises:
        ValueError: a column does not exist, or the dataset's classes are not the model's.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Examples):
        return dataset
    name = name or "examples"
    if isinstance(dataset, IterableDataset):
        splits, split = dataset.info.splits, str(dataset.split)
        total = splits[split].num_examples if splits and split in splits else None
        return _with_columns(dataset.decode(False), dataset.features, name, columns, label2id, total)
    if isinstance(dataset, Dataset):
        decoding = dataset.features
        encoded = dataset
        for column, feature in decoding.items():
            if type(feature).__name__ == "Image":
                encoded = encoded.cast_column(column, type(feature)(decode=False))
        return _with_columns(encoded, decoding, name, columns, label2id, len(dataset))
    return Examples(dataset, name, len(dataset) if isinstance(dataset, Sized) else None)


def _with_columns(dataset, features, name, columns, label2id, total) -> Examples:
    """Rename a dataset's columns to ours, and its classes to the model's where both have the same names."""
    columns = dict(columns or {})
    known = list(features or next(iter(dataset), {}))
    for role, names in (("image", IMAGE_NAMES), ("label", LABEL_NAMES), ("mask", MASK_NAMES), ("id", ID_NAMES)):
        column = columns.setdefault(role, next((candidate for candidate in names if candidate in known), None))
        if column is not None and column not in known:
            raise ValueError(f"{role}_column {column!r} is not a column of {name}, which has {', '.join(known)}.")
    if columns["image"] is None:
        raise ValueError(f"{name} has no image column among {', '.join(known)}: name it with --image-column.")
    to_id, note = _label_mapping(features, columns["label"], label2id, name)
    columns = {role: column for role, column in columns.items() if column is not None}
    return Examples(_Rows(dataset, name, columns, to_id), name, total, columns, note)


@dataclass
class _Rows:
    """Rows of a dataset under our names; a class, so that it can be iterated twice."""

    dataset: Iterable[dict]
    name: str
    columns: dict[str, str]
    to_id: dict | None

    def __iter__(self) -> Iterator[dict]:
        for row in self._read():
            example = {role: row[column] for role, column in self.columns.items()}
            if self.to_id is not None and example.get("label") is not None:
                label = example["label"]
                many = isinstance(label, (list, tuple))
                example["label"] = [self._class_id(one) for one in label] if many else self._class_id(label)
            yield example

    def _read(self) -> Iterator[dict]:
        """The dataset's rows; what ends them early, such as a damaged shard, is named."""
        rows, number = iter(self.dataset), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # every format's reader raises errors of its own
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(f"{self.name} cannot be read beyond row {number}: {reason}") from error
            if row is None:
                return
            yield row
            number += 1

    def _class_id(self, label) -> int:
        if label not in self.to_id:
            raise ValueError(f"label {label!r} is not a class of the model: name the right --label-column.")
        return self.to_id[label]


def _label_mapping(features, column: str | None, label2id: dict[str, int] | None, name: str) -> tuple[dict | None, str]:
    """Dataset's label -> model's class id, or None where the ids are taken as they are; and a note on it.

    Raises:
        ValueError: the dataset has another number of classes than the model, under other names.
    """
    feature = (features or {}).get(column)
    feature = getattr(feature, "feature", feature)  # a list of labels
    names = getattr(feature, "names", None)
    if not label2id:
        return None, ""
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return {class_name: int(index) for class_name, index in label2id.items()}, ""
    if not names or all(class_name == f"LABEL_{index}" for class_name, index in label2id.items()):
        return None, ""  # one of the two has no names
    num_labels = max(map(int, label2id.values())) + 1
    unique = len(label2id) == num_labels  # two classes of a name: it does not say which is meant
    if unique and all(class_name in label2id for class_name in names):
        return {index: int(label2id[class_name]) for index, class_name in enumerate(names)}, ""
    if len(names) != num_labels:
        raise ValueError(
            f"{name} has {len(names)} classes ({names[0]!r}, ...) and the model {num_labels} "
            f"({next(iter(label2id))!r}, ...), and not all of the dataset's are the model's: give them the same names."
        )
    return None, "The dataset's classes have other names than the model's and were taken by their numbers."


def decode_image(value) -> Image.Image:
    """An RGB image from a PIL image, an array, encoded bytes, a path, or what `datasets` yields undecoded.

    Raises:
        OSError: it cannot be decoded.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    try:
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, (str, Path)):
            value = Image.open(value)
        elif not isinstance(value, Image.Image):
            value = Image.fromarray(np.asarray(value))
        return ImageOps.exif_transpose(value).convert("RGB")
    except Exception as error:  # PIL's decoders raise whatever they meet in a broken file
        raise OSError(f"{type(error).__name__}: {error}") from error


def decode_mask(value, size: tuple[int, int]) -> Image.Image:
    """A mask as an image, 255 on the object; `size` is the image's (width, height).

    Raises:
        OSError: it cannot be decoded.
        ValueError: it has another size than its image.
    """
    if not isinstance(value, (dict, bytes, str, Path, Image.Image)):
        value = Image.fromarray((np.asarray(value) > 0).astype(np.uint8) * 255)
    mask = decode_image(value)
    if mask.size != size:
        raise ValueError(f"has a mask of {mask.size[0]}x{mask.size[1]} for an image of {size[0]}x{size[1]}")
    return Image.fromarray((np.asarray(mask).max(2) > 0).astype(np.uint8) * 255)


def read_blocks(examples: Examples, block_size: int, max_images: int | None) -> Iterator[tuple[int, list[dict]]]:
    """Consecutive rows in blocks of `block_size`, numbered; the same rows share a block in every run, whatever the
    number of processes and wherever an earlier run ended, so that results do not depend on either."""
    rows, number = [], 0
    for index, row in enumerate(examples):
        if index == max_images:
            break
        rows.append({**row, "index": index})
        if len(rows) == block_size:
            yield number, rows
            rows, number = [], number + 1
    if rows:
        yield number, rows


def prepare_block(number: int, rows: list[dict], preprocessor: Preprocessor, num_labels: int) -> Block:
    """Decode and preprocess a block of rows.

    Raises:
        ValueError: on a class id the model does not have, or a mask of another size than its image.
    """
    block, images = Block(number), []
    for row in rows:
        if "image" not in row:
            raise ValueError(f"example {row['index']} has no 'image' but {', '.join(row) or 'nothing'}.")
        identity = str(row["id"]) if row.get("id") is not None else _path_of(row)
        try:
            image = decode_image(row["image"])
            mask = None if row.get("mask") is None else decode_mask(row["mask"], image.size)
        except OSError as error:
            block.skipped.append({"index": row["index"], "id": identity, "reason": str(error)})
            continue
        except ValueError as error:
            raise ValueError(f"image {identity!r} {error}.") from None
        images.append(image)
        block.indices.append(row["index"])
        block.ids.append(identity)
        block.labels.append(_class_ids(row.get("label"), identity, num_labels))
        block.masks.append(None if mask is None else preprocessor.mask(mask))
    if images:
        block.images = preprocessor.to_pixel_space(preprocessor.normalized(images))
        # from the images again, so that a map of ones leaves not even a rounding difference
        block.pixel_values = normalize_images(block.images, preprocessor.mean, preprocessor.std)
    return block


def _path_of(row: dict) -> str:
    image = row["image"]
    path = image.get("path") if isinstance(image, dict) else None
    return Path(path).name if path else str(row["index"])


def _class_ids(label, identity: str, num_labels: int) -> list[int]:
    """Class ids of a row; none for a missing label, which some datasets write as -1 or None."""
    if label is None:
        return []
    if isinstance(label, (np.ndarray, torch.Tensor)):
        label = label.tolist()
    if isinstance(label, bytes):
        label = label.decode()
    values = label if isinstance(label, (list, tuple)) else [label]
    try:
        ids = [int(value) for value in values]
        whole = all(isinstance(value, str) or value == number for value, number in zip(values, ids, strict=True))
    except (TypeError, ValueError):
        whole = False
    ids = [value for value in ids if value != -1] if whole else []
    if not whole or len(set(ids)) < len(ids):  # zeros and ones of all classes would pass for ids
        raise ValueError(f"image {identity!r} has the label {_brief(label)}: give a class id, or a list of them.")
    outside = [value for value in ids if not 0 <= value < num_labels]
    if outside:
        raise ValueError(f"image {identity!r} has the class id {outside[0]}: the model's are 0 to {num_labels - 1}.")
    return ids


def _brief(label) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:60]}..."
