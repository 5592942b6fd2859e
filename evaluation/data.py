"""Examples to evaluate on: any classification dataset, streamed, and its images as the network sees them.

A row of a dataset becomes {"id", "image", "label", "mask", "boxes"}, still encoded; it is decoded only by the process
whose turn it is. An image that cannot be decoded is skipped and its id kept, so that one bad file does not end a long
run.
"""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from castream.data.decoding import open_image, open_mask
from castream.data.files import file_name
from castream.data.labels import UnknownClassesError, class_ids
from castream.data.opening import Split, describe_dataset, fingerprint
from PIL import Image

from modeling_castream.preprocessing_castream import image_mode, picture, pixel_scale, process

from .localization import box_mask
from .masking import normalize_images


@dataclass
class Examples:
    """An iterable of rows {"id", "image", "label", "mask", "boxes"} and what is known about it.

    Args:
        rows: yields the rows; a second iteration starts again, unless it is an iterator.
        name: for reports.
        total: number of rows, None if unknown.
        columns: the dataset's column of each role, {"image": ...}; none for rows that come under our names.
        note: sentences for the report, or "".
        fingerprint: of the files, see `castream.data.opening.fingerprint`; "" where there is none.
    """

    rows: Iterable[dict]
    name: str = "examples"
    total: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    note: str = ""
    fingerprint: str = ""

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

    def first(self, count: int) -> "Block":
        """The first `count` of its images, or all of fewer."""
        parts = (self.indices, self.ids, self.labels, self.masks, self.images, self.pixel_values)
        return Block(self.number, *(part[:count] for part in parts))


class Preprocessor:
    """An image processor, and the affine map between its output and pixel space, which is measured.

    Args:
        num_channels: of the network's input: one gets grey pictures, four those with an alpha channel.

    Raises:
        ValueError: where the processor shows the network nothing of an image.
    """

    def __init__(self, image_processor, num_channels: int = 3):
        self.image_processor = image_processor
        self.mode = image_mode(image_processor, num_channels)
        self.mean, self.std = pixel_scale(image_processor, num_channels)
        self.size = tuple(self._process(Image.new(self.mode, (256, 256))).shape[1:])

    def _process(self, image: Image.Image) -> torch.Tensor:
        shown = image if image.mode == self.mode else image.convert(self.mode)
        return torch.as_tensor(process(self.image_processor, shown), dtype=torch.float32)

    def normalized(self, images: list[Image.Image]) -> torch.Tensor:
        """The network's input, (batch_size, num_channels, height, width)."""
        processed = [self._process(image) for image in images]
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
        processed = self.to_pixel_space(self.normalized([picture(np.asarray(mask), self.mode)]))
        return processed[0].mean(0) > 0.5


def read_examples(dataset, name: str | None = None, id2label: dict[int, str] | None = None) -> Examples:
    """Examples of a split that `castream.data` opened, a `datasets` dataset, or any iterable of dictionaries.

    Args:
        name: for the report.
        id2label: the model's class names; used where the dataset has the same names in another order.

    Raises:
        ValueError: a column does not exist, or some of the dataset's classes are not the model's.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Examples):
        return dataset
    if isinstance(dataset, (Dataset, IterableDataset)):
        dataset = describe_dataset(dataset, name or "examples")
    if not isinstance(dataset, Split):
        return Examples(dataset, name or "examples", len(dataset) if isinstance(dataset, Sized) else None)
    split = _with_classes(dataset, id2label)
    return Examples(
        _Rows(split), name or split.name, split.num_rows, split.columns, " ".join(split.notes), fingerprint(split)
    )


def _with_classes(split: Split, id2label: dict[int, str] | None) -> Split:
    """The split with the model's class ids, or without labels where none of its classes is the model's."""
    if not id2label:
        return split
    if len(id2label) == 1 and split.class_names and len(split.class_names) == 2:
        note = f"The model's one logit is taken for {split.class_names[1]!r} against {split.class_names[0]!r}."
        return replace(split, notes=(*split.notes, note))
    try:
        return split.match_classes(id2label)
    except UnknownClassesError as error:
        return split.without_labels(str(error))


@dataclass
class _Rows:
    """Rows of a split; a class, so that it can be iterated twice."""

    split: Split

    def __iter__(self) -> Iterator[dict]:
        return self.split.examples()


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


def prepare_block(
    number: int, rows: list[dict], preprocessor: Preprocessor, num_labels: int, read_boxes: bool = True
) -> Block:
    """Decode and preprocess a block of rows.

    Args:
        read_boxes: whether the boxes of a row without a mask stand in for it.

    Raises:
        ValueError: on a class id the model does not have, a mask of another size than its image, or malformed boxes.
    """
    block, images = Block(number), []
    for row in rows:
        if "image" not in row:
            raise ValueError(f"example {row['index']} has no 'image' but {', '.join(row) or 'nothing'}.")
        identity = str(row["id"]) if row.get("id") is not None else _path_of(row)
        try:
            image = open_image(row["image"])
            mask = _object_mask(row, image.size, read_boxes)
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


def _object_mask(row: dict, size: tuple[int, int], read_boxes: bool) -> Image.Image | None:
    """The object of an image of `size` = (width, height): its mask or, without one, its boxes; None without either."""
    if row.get("mask") is not None:
        return open_mask(row["mask"], size)
    if not read_boxes or row.get("boxes") is None or not len(row["boxes"]):
        return None
    try:
        return open_mask(box_mask(row["boxes"], size[::-1]), size)
    except ValueError as error:
        raise ValueError(f"has a wrong box: {error}") from None


def _path_of(row: dict) -> str:
    image = row["image"]
    path = image.get("path") if isinstance(image, dict) else None
    return file_name(path) if path else str(row["index"])


def _class_ids(label, identity: str, num_labels: int) -> list[int]:
    """Class ids of a row; none for a missing label, which some datasets write as -1 or None."""
    ids = [] if label is None else class_ids(label, {}, identity)
    last = max(num_labels, 2) - 1  # a single logit tells 0 from 1
    outside = [number for number in ids if not 0 <= number <= last]
    if outside:
        raise ValueError(f"image {identity!r} has the class id {outside[0]}: the model's are 0 to {last}.")
    return ids
