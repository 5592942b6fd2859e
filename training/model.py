"""The model before its first step: converted, with a classifier for the dataset's classes, what is trained unfrozen."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from castream.artifacts.files import new_folder, write_json
from castream.artifacts.models import load_image_processor, load_model
from castream.conversion import convert_classifier
from castream.data.labels import classes_fit
from castream.data.opening import Split
from torch.nn import functional as F

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

from .loop import to_device
from .objective import Objective

TRAINING_FILE = "training.json"
CLASSIFIER_L2 = 0.03  # penalty of a fitted classifier, on standardised features


def load_source(source: str, checkpoint: str | None, variant: str) -> tuple[CAStreamForImageClassification, object]:
    """What to train, and its image processor.

    Args:
        source: a CA-Stream folder, or a source of the conversion; checkpoint: file with its weights.
        variant: of the stream, where it is converted.

    Raises:
        ValueError: where it cannot be had; in one line.
    """
    config = Path(source) / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") == "castream":
        return load_model(source), load_image_processor(source)
    try:
        return convert_classifier(source, checkpoint=checkpoint, variant=variant)
    except (OSError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model={source!r} cannot be loaded: {reason}") from error


def adapt_model(
    source: CAStreamForImageClassification, split: Split, classifier: str, stream: dict, seed: int
) -> tuple[CAStreamForImageClassification, bool]:
    """Give a network the stream that the settings describe, and a classifier for the dataset's classes.

    Args:
        classifier: `"auto"`, `"keep"`, `"fit"` or `"new"`.
        stream: fields of CAStreamConfig; what is None there stays the source's.
        seed: of new weights.

    Returns:
        The model, and whether its classifier is still to be fitted.

    Raises:
        ValueError: on classes that do not fit; in one line.
    """
    names, available = split.class_names, source.config.num_labels
    fits = names is None or (len(names) == available and classes_fit(names, source.config.id2label))
    keep = classifier == "keep" or (classifier == "auto" and fits)
    if not keep and names is None:
        raise ValueError(f"classifier={classifier} needs a dataset that names its classes, and this one does not.")
    changes = {name: value for name, value in stream.items() if value is not None}
    same_stream = all(getattr(source.config, name) == value for name, value in changes.items() if name != "init")
    if not keep and not isinstance(source.classifier, torch.nn.Linear):
        raise ValueError(
            f"classifier={classifier} needs a network that ends in one linear layer, and this one's logits come from "
            f"several: train on a dataset of its own {available} classes, with classifier=keep."
        )
    if keep and same_stream and changes["init"] == "gap":  # a stream that is trained already is trained further
        model = source
    else:
        model = _rebuild(source, changes, None if keep else names, seed)
    if split.multi_label:
        model.config.problem_type = "multi_label_classification"
    elif not keep:
        model.config.problem_type = "single_label_classification"
    return model, not keep and classifier != "new"


def _rebuild(source: CAStreamForImageClassification, changes: dict, names: list[str] | None, seed: int):
    """The same network with a new stream, and with new classes where they are named."""
    fields = source.config.to_dict() | {"stream_layers": None, "evidence_layers": None} | changes
    fields |= {"stream_channels": None, "evidence_channels": None}
    if names is not None:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    torch.manual_seed(seed)
    model = CAStreamForImageClassification(CAStreamConfig.from_dict(fields))
    model.castream.backbone.load_state_dict(source.castream.backbone.state_dict())
    model.castream.neck.load_state_dict(source.castream.neck.state_dict())
    model.head.load_state_dict(source.head.state_dict())
    if names is None:
        model.classifier.load_state_dict(source.classifier.state_dict())
    return model.eval()


def save_model(folder: Path, model: CAStreamForImageClassification, image_processor, facts: dict | None = None) -> None:
    """Write a folder that `from_pretrained` loads; whole or not at all.

    Args:
        facts: what else is known of the model, for TRAINING_FILE.

    Raises:
        OSError: where it cannot be written.
    """
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        image_processor.save_pretrained(partial)
        if facts is not None:
            write_json(partial / TRAINING_FILE, facts)


def unfreeze(
    model: CAStreamForImageClassification, train_stream: bool, train_evidence: bool, freeze_output_projection: bool
) -> dict[str, torch.nn.Parameter]:
    """Put a model into training mode; what is trained follows from these settings and the config's.

    A last map W_L that starts at zero, as where the source averages nothing, is trained in any case: behind zeros the
    stream has no gradient.

    Returns:
        The parameters that are trained, by name.
    """
    model.requires_grad_(True).freeze()
    model.train()
    stream = model.castream.stream
    stream.requires_grad_(train_stream)
    model.evidence.requires_grad_(train_evidence)
    if freeze_output_projection and model.config.source_pooling == "gap":
        stream.blocks[-1].projection.requires_grad_(False)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fit_classifier(accelerator: Accelerator, objective: Objective, batches: Iterator[tuple[dict, object]]) -> None:
    """Give the objective's model a linear classifier for the dataset's classes, fitted to its GAP features.

    Args:
        batches: of this process, as a loader's epoch yields them.

    Raises:
        ValueError: where no image could be decoded, or the labels hold a single class.
    """
    model = objective.model
    features, labels = _pooled_features(accelerator, objective, batches)
    if not len(labels):
        raise ValueError("not one image of the training split could be decoded: see bad_images.txt.")
    weight, bias = fit_linear_classifier(features, labels, model.config.num_labels, CLASSIFIER_L2)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    accelerator.print(f"fitted a linear classifier for {model.config.num_labels} classes to {len(labels)} images")


@torch.no_grad()
def _pooled_features(accelerator: Accelerator, objective: Objective, batches: Iterator[tuple[dict, object]]) -> tuple:
    """What the classifier reads under the source's own pooling, and labels, of all processes' images.

    Returns:
        (num_images, num_features) and (num_images,) or (num_images, num_labels), on the CPU, the same everywhere.
    """
    found = []  # a process may have none
    for batch, _ in batches:
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            view = batch["features"]["view"] if "features" in batch else objective.extract_view(batch)
        feature_maps, cls_token = view
        pooled, _ = objective.model.castream.pool_features((feature_maps[-1].float(),), "source")
        read = objective.model.readout(pooled, cls_token)
        found.append((read.float().cpu(), batch["labels"].cpu()))
    gathered = gather_object(found) if accelerator.num_processes > 1 else found
    return tuple(torch.cat(parts) for parts in zip(*gathered, strict=True)) if gathered else ((), ())


def fit_linear_classifier(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int, l2: float, max_iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression, multinomial or, with several labels per image, binary.

    Minimises cross-entropy + l2 / 2 ||W||^2 by L-BFGS on standardised features, then folds the standardisation in.
    (scikit-learn's LogisticRegression takes class ids only, stops by another rule and would move the demo's table.)

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
    cross_entropy = F.cross_entropy if labels.ndim == 1 else F.binary_cross_entropy_with_logits
    targets = labels if labels.ndim == 1 else labels.double()

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight.float(), (bias.detach() - weight @ mean).float()
