"""A linear classifier on frozen features: multinomial (with several labels an image, binary) logistic regression."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn import functional as F


def fit_linear_classifier(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int, l2: float, max_iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise cross-entropy + l2 / 2 ||W||^2 by L-BFGS on standardised features, then fold the standardisation in.

    Args:
        features: (num_images, num_features).
        labels: class ids (num_images,), or 0/1 floats (num_images, num_labels).
        l2: penalty, in units of the mean loss.

    Returns:
        Weight (num_labels, num_features) and bias (num_labels,) for the features as they are, float32.

    Raises:
        ValueError: where a single-label problem has fewer than two classes among its labels.
    """
    if labels.ndim == 1 and labels.unique().numel() < 2:
        raise ValueError("a classifier can only be fitted to at least two classes; the labels hold one.")
    features = features.double()
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(num_labels, inputs.shape[1], dtype=torch.double, device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_labels, dtype=torch.double, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = inputs @ weight.T + bias
        loss = F.cross_entropy(logits, labels) if labels.ndim == 1 else _binary(logits, labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight.float(), (bias.detach() - weight @ mean).float()


def _binary(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


@torch.no_grad()
def pooled_features(accelerator: Accelerator, model: torch.nn.Module, batches: Iterator[dict], objective) -> tuple:
    """GAP features that the classifier reads, and labels, of all processes' images.

    Args:
        batches: of this process, with `images` or cached `features`, and `labels`.
        objective: the Objective, for its `extract`.

    Returns:
        (num_images, num_features) and (num_images,) or (num_images, num_labels), on the CPU, the same everywhere.
    """
    features, labels = [], []
    for batch in batches:
        with accelerator.autocast():
            found = batch["features"] if "features" in batch else objective.extract(batch)
        feature_maps, cls_token = found["view"]
        pooled = model.head(feature_maps[-1].float().mean((2, 3)))
        features.append((pooled if cls_token is None else torch.cat([cls_token, pooled], -1)).float().cpu())
        labels.append(batch["labels"].cpu())
    gathered = list(zip(features, labels, strict=True))  # a process may have none
    if accelerator.num_processes > 1:
        gathered = gather_object(gathered)
    return tuple(torch.cat(parts) for parts in zip(*gathered, strict=True)) if gathered else ((), ())
