"""Held-out images for the evaluation, and what the stream attends to on them."""

from collections.abc import Iterator

import torch
from castream.data.opening import MASK_COLUMN, UNLABELLED, Split
from castream.data.transforms import DECODING_ERRORS, read_image

from .objectives import attention_entropy


class HeldOut:
    """Rows {"id", "image", "label", "mask"} of a split, in its order; images and masks stay encoded, no label is None.

    Args:
        split: what `open_split` returned.
        name: the first part of the ids.
    """

    def __init__(self, split: Split, name: str):
        self.split, self.name = split, name

    def __iter__(self) -> Iterator[dict]:
        split = self.split
        for index, row in enumerate(split.stream):
            key = f"{self.name}-{index}"
            example = {"id": key, "image": row[split.image_column], "label": None, "mask": row.get(MASK_COLUMN)}
            if split.label_column and row[split.label_column] not in (None, UNLABELLED):
                ids = split.class_ids(row, key)
                example["label"] = ids if split.multi_label else ids[0]
            yield example

    @property
    def has_masks(self) -> bool:
        """Whether the objects' masks are known."""
        return MASK_COLUMN in self.split.stream.column_names


@torch.no_grad()
def measure_entropy(model: torch.nn.Module, pixel_values: list[torch.Tensor]) -> list[float]:
    """Mean entropy of every block's attention, relative to the uniform one: 1 is uniform, 0 a single position.

    Args:
        pixel_values: batches, normalised.
    """
    if not pixel_values:
        return []
    training = model.training
    sums = sum(attention_entropy(model.eval()(batch).attention_maps) for batch in pixel_values)
    model.train(training)
    return (sums / sum(len(batch) for batch in pixel_values)).tolist()


def pixel_batches(examples: HeldOut, transform, count: int, batch_size: int = 32) -> list[torch.Tensor]:
    """The first `count` images that decode, uint8, in batches.

    Args:
        transform: from a decoded image to uint8 pixels of the network's size.
    """
    images = []
    for row in examples:
        if len(images) == count:
            break
        try:
            images.append(transform(read_image(row["image"])))
        except DECODING_ERRORS:
            continue
    return [torch.stack(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
