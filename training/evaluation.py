"""What the trained model is worth on held-out images."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from castream.artifacts.files import write_json
from castream.data.decoding import DECODING_ERRORS, read_image
from castream.data.opening import Split
from castream.data.transforms import ImageTransform, pixel_statistics
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.settings import LOCALIZATION_METRICS

from modeling_castream import CAStreamForImageClassification

from .objective import Objective, attention_entropy

ENTROPY_IMAGES = 128  # held-out images on which the attention's entropy is reported


class HeldOut:
    """Rows {"id", "image", "label", "mask"} of a split, in its order; images and masks stay encoded, no label is None.

    Args:
        split: what `open_split` returned.
        name: the first part of the ids.
    """

    def __init__(self, split: Split, name: str):
        self.split, self.name = split, name

    def __iter__(self) -> Iterator[dict]:
        for index, row in enumerate(self.split.examples()):
            label = row["label"] if self.split.multi_label or row["label"] is None else row["label"][0]
            yield row | {"id": f"{self.name}-{index}", "label": label}

    @property
    def has_masks(self) -> bool:
        """Whether the objects' masks are known."""
        return self.split.has_masks


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


def _decoded(rows: Iterable[dict], transform: ImageTransform) -> Iterator[tuple[torch.Tensor, dict]]:
    """Pixels of the network's size, uint8, and the row, of those that decode."""
    for row in rows:
        with suppress(*DECODING_ERRORS):
            yield transform(read_image(row["image"])), row


def _batched(values: Iterable, size: int) -> Iterator[list]:
    """Lists of `size`, the last one shorter."""
    values = iter(values)
    while batch := list(itertools.islice(values, size)):
        yield batch


def first_batches(
    objective: Objective, held_out: HeldOut | None, transform: ImageTransform, device: torch.device
) -> list[torch.Tensor]:
    """The first ENTROPY_IMAGES held-out images that decode, normalised, in batches."""
    images = (pixels for pixels, _ in itertools.islice(_decoded(held_out or (), transform), ENTROPY_IMAGES))
    return [objective.normalize(torch.stack(batch).to(device)) for batch in _batched(images, 32)]


def evaluate(
    accelerator: Accelerator,
    model: CAStreamForImageClassification,
    image_processor,
    held_out: HeldOut,
    settings: EvaluationSettings,
    folder: Path,
    **names: str,
) -> None:
    """The source's own pooling and CA side by side on held-out images, printed and written to a folder.

    Where the source averages nothing, methods that need a pooling over positions are left out.

    Args:
        names: `model_name` and `dataset_name`, for the report.
    """
    masks = LOCALIZATION_METRICS if held_out.has_masks else ()
    settings = replace(settings, metrics=tuple(dict.fromkeys((*settings.metrics, *masks))))
    settings = settings.for_model(model.config)
    report = evaluate_saliency(model.eval(), image_processor, held_out, settings, str(folder), accelerator, **names)
    accelerator.print("\n" + report.markdown())


@torch.no_grad()
def evaluate_precision(
    accelerator: Accelerator, model, image_processor, held_out: HeldOut, batch_size: int, folder: Path
) -> None:
    """Mean average precision of both poolings, the accuracy of classifiers with several labels per image.

    Each image counts once over all processes.

    Args:
        folder: for mean_average_precision.json, `{"gap": percent, "ca": percent, "images": number of images}`;
            `"source"` for `"gap"` where the source averages nothing.
    """
    model.eval()
    objective = Objective(model, *pixel_statistics(image_processor)).to(accelerator.device)
    mine = itertools.islice(held_out, accelerator.process_index, None, accelerator.num_processes)
    found, own = [], model.config.source_pooling
    for batch in _batched(_decoded(mine, ImageTransform(image_processor, "none")), batch_size):
        normalized = objective.normalize(torch.stack([pixels for pixels, _ in batch]).to(accelerator.device))
        labels = torch.zeros(len(batch), model.config.num_labels)
        for row, (_, example) in zip(labels, batch, strict=True):
            row[example["label"] or []] = 1.0
        found.append((*(model(normalized, pooling=name).logits.float().cpu() for name in (own, "ca")), labels))
    gathered = gather_object(found) if accelerator.num_processes > 1 else found
    source, ca, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    scores = {own: mean_average_precision(source, labels), "ca": mean_average_precision(ca, labels)}
    scores |= {"images": len(labels)}
    accelerator.print(
        f"mean average precision: {own.upper()} {scores[own]:.2f}, CA {scores['ca']:.2f}, on {len(labels)} images"
    )
    if accelerator.is_main_process:
        write_json(folder / "mean_average_precision.json", scores)


def mean_average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over classes of the average precision: the mean, over a class's images, of the precision at their ranks.

    (scikit-learn's, without that dependency; it gives tied scores one rank, this orders them by index.)

    Args:
        scores: (num_images, num_labels), higher for more probable classes.
        labels: 0/1, of the same shape.

    Returns:
        In percent, over the classes that have an image; nan where none has.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = labels.gather(0, order).double()
    ranks = torch.arange(1, len(hits) + 1, dtype=torch.double)[:, None]
    positives = hits.sum(0)
    precision = (hits.cumsum(0) / ranks * hits).sum(0) / positives.clamp(min=1)
    return 100 * precision[positives > 0].mean().item()
