"""Mean average precision, the accuracy of classifiers with several labels an image."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from castream.data.transforms import DECODING_ERRORS, read_image

from .heldout import HeldOut


def mean_average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over classes of the average precision: the mean, over a class's images, of the precision at their ranks.

    Args:
        scores: (num_images, num_labels), higher for more probable classes; ties are ordered by index.
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


@torch.no_grad()
def score_held_out(accelerator: Accelerator, objective, held_out: HeldOut, transform, batch_size: int) -> dict:
    """Mean average precision of both poolings on held-out images, each counted once over all processes.

    Args:
        objective: an Objective.
        transform: from a decoded image to uint8 pixels of the network's size.

    Returns:
        {"gap": percent, "ca": percent, "images": number of images}.
    """
    model = objective.model.eval()
    found, batch = [], []

    def run() -> None:
        pixels = torch.stack([pixels for pixels, _ in batch]).to(accelerator.device)
        normalized = objective.normalize(pixels)
        scores = [model(normalized, pooling=pooling).logits.float().cpu() for pooling in ("gap", "ca")]
        found.append((*scores, torch.stack([labels for _, labels in batch])))
        batch.clear()

    for index, row in enumerate(held_out):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        try:
            pixels = transform(read_image(row["image"]))
        except DECODING_ERRORS:
            continue
        ids = torch.tensor(row["label"] or [], dtype=torch.long)
        batch.append((pixels, torch.zeros(model.config.num_labels).index_fill_(0, ids, 1.0)))
        if len(batch) == batch_size:
            run()
    if batch:
        run()
    gathered = gather_object(found) if accelerator.num_processes > 1 else found
    gap, ca, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    scores = {"gap": mean_average_precision(gap, labels), "ca": mean_average_precision(ca, labels)}
    return scores | {"images": len(labels)}
