"""From a block of images to the rows of the per-image table.

One backbone pass of the images serves every method and pooling. Every masked or perturbed image passes the backbone once,
too, and is scored under all poolings and controls that need it; maps that are equal, such as the raw attention under
either pooling, share their masked images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from modeling_castream.saliency_castream import Features, empty_maps, explain_features, extract

from .controls import control_maps, map_area, match_area, match_norm, rank_correlation, shuffled_classifier
from .data import Block
from .localization import mask_share, pointing_hit, sparsity
from .metrics.average_drop.average_drop import average_drop
from .metrics.average_gain.average_gain import average_gain
from .metrics.average_increase.average_increase import average_increase
from .metrics.deletion.deletion import deletion
from .metrics.insertion.insertion import insertion
from .metrics.mask_share.mask_share import mask_share as mask_share_percent
from .metrics.negative_perturbation.negative_perturbation import negative_perturbation
from .metrics.pointing_game.pointing_game import pointing_game
from .metrics.positive_perturbation.positive_perturbation import positive_perturbation
from .perturbation import mask_images, perturbation_images, pixel_order, upsample_saliency
from .protocol import deletion_end, inner_points, insertion_start, saliency_order
from .settings import (
    CONTROL_MAPS,
    CURVE_METRICS,
    MASK_METRICS,
    MASKING_METRICS,
    PERTURBATION_METRICS,
    EvaluationSettings,
)

MASKING_FUNCTIONS = {
    "average_drop": average_drop,
    "average_gain": average_gain,
    "average_increase": average_increase,
}
CURVE_FUNCTIONS = {"insertion": insertion, "deletion": deletion}
PERTURBATION_FUNCTIONS = {
    "positive_perturbation": positive_perturbation,
    "negative_perturbation": negative_perturbation,
}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """A row of the table: whose map, and who scores it.

    Args:
        method: a saliency method, or a control map.
        pooling: of the map.
        control: "" for the plain protocol.
        scoring: who gives the probabilities: a pooling, "gap_temperature" or "ca_norm".
    """

    method: str
    pooling: str
    control: str
    scoring: str

    @property
    def map_key(self) -> tuple[str, str, bool]:
        """Method, pooling, and whether the area is matched."""
        return self.method, self.pooling, "area" in self.control


@dataclass
class Scores:
    """The target's probability and the predicted class, each (batch_size,), by scoring."""

    probability: dict[str, torch.Tensor]
    predicted: dict[str, torch.Tensor]


def table_rows(settings: EvaluationSettings) -> list[Row]:
    """The rows that the settings ask for, in the order of the report."""
    controls, rows = settings.controls, []
    for method in (*settings.methods, *(name for name in CONTROL_MAPS if name in controls)):
        for area in ("", "area") if "area" in controls else ("",):
            rows += [Row(method, pooling, area, pooling) for pooling in settings.poolings]
            if "map_only" in controls and method not in CONTROL_MAPS:
                rows.append(Row(method, "ca", "map_only_area" if area else "map_only", "gap"))
        if "temperature" in controls:
            rows.append(Row(method, "gap", "temperature", "gap_temperature"))
        if "norm" in controls:
            rows.append(Row(method, "ca", "norm", "ca_norm"))
    return rows


class Scorer:
    """A model, and everything that turns its features into probabilities.

    Args:
        model: a CAStreamForImageClassification.
        settings: the evaluation's.
        temperature: of the scoring "gap_temperature".
    """

    def __init__(self, model: nn.Module, settings: EvaluationSettings, temperature: float | None = None):
        self.model, self.settings, self.temperature = model, settings, temperature
        self.scorings = list(dict.fromkeys(row.scoring for row in table_rows(settings)))
        self.multi_label = model.config.problem_type == "multi_label_classification"

    def features(self, pixel_values: torch.Tensor) -> Features:
        """One backbone pass, under the settings' autocast."""
        dtype = AUTOCAST_DTYPES.get(self.settings.autocast)
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            return extract(self.model, pixel_values)

    def logits(self, features: Features, scoring: str) -> torch.Tensor:
        """Logits (batch_size, num_labels), float32, under a scoring."""
        if scoring == "gap_temperature":
            return features.logits("gap").float() / self.temperature
        if scoring == "ca_norm":
            with torch.no_grad():
                vector = match_norm(features.pool("ca").pooler_output, features.pool("gap").pooler_output)
                return self.model.classify(vector, features.cls_token).float()
        return features.logits(scoring).float()

    def probabilities(self, features: Features, scoring: str) -> torch.Tensor:
        """Softmax probabilities (batch_size, num_labels); for multi-label models each class's own."""
        logits = self.logits(features, scoring)
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def score(self, pixel_values: torch.Tensor, target: torch.Tensor) -> Scores:
        """Score images (batch_size, num_channels, height, width), `batch_size` of the settings at a time."""
        size = self.settings.batch_size
        parts = [
            self.score_features(self.features(images), classes)
            for images, classes in zip(pixel_values.split(size), target.split(size), strict=True)
        ]
        return Scores(
            {scoring: torch.cat([part.probability[scoring] for part in parts]) for scoring in self.scorings},
            {scoring: torch.cat([part.predicted[scoring] for part in parts]) for scoring in self.scorings},
        )

    def score_features(self, features: Features, target: torch.Tensor) -> Scores:
        """Score images that went through the backbone.

        Raises:
            ValueError: on NaN or infinite logits.
        """
        scores = Scores({}, {})
        for scoring in self.scorings:
            probabilities = self.probabilities(features, scoring)
            bad = (~probabilities.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"logits under {scoring} are NaN or infinite for image {bad[0]} of a batch: the weights or, under "
                    f"autocast={self.settings.autocast!r}, the precision are broken."
                )
            scores.probability[scoring] = probabilities.gather(1, target[:, None])[:, 0]
            scores.predicted[scoring] = probabilities.argmax(1)
        return scores


@dataclass
class Items:
    """What is explained: one item a positive label, in the order of the block's images.

    Args:
        image: place of each item's image within the block, (num_items,).
        target: its class, (num_items,).
        pixel_values, images: of each item.
        features: of each item, from one backbone pass per image.
        before: scores of the unmasked images.
    """

    image: torch.Tensor
    target: torch.Tensor
    pixel_values: torch.Tensor
    images: torch.Tensor
    features: Features
    before: Scores


def read_items(scorer: Scorer, block: Block) -> Items:
    """The backbone pass of a block, and its items."""
    settings, device = scorer.settings, scorer.model.device
    pixel_values = block.pixel_values.to(device)
    features = scorer.features(pixel_values)
    predicted = scorer.logits(features, settings.poolings[0]).argmax(1).tolist()
    explained = [
        labels if labels and settings.target == "label" else [predicted[place]]
        for place, labels in enumerate(block.labels)
    ]
    image = torch.tensor([place for place, labels in enumerate(explained) for _ in labels], device=device)
    target = torch.tensor(list(chain.from_iterable(explained)), device=device)
    if len(image) != len(pixel_values):  # several labels an image
        features, pixel_values = features.select(image), pixel_values[image]
    images = block.images.to(device)[image]
    return Items(image, target, pixel_values, images, features, scorer.score_features(features, target))


def compute_maps(
    model: nn.Module, items: Items, block: Block, settings: EvaluationSettings
) -> dict[tuple[str, str, bool], torch.Tensor]:
    """Every map of the table, (num_items, height, width) in [0, 1] at its own resolution, by `Row.map_key`."""
    maps, poolings = {}, list(settings.poolings)
    for method in settings.methods:
        by_pooling = explain_features(items.features, items.target, method, poolings)
        maps |= {(method, pooling, False): by_pooling[pooling] for pooling in poolings}
    size = items.features.feature_maps[-1].shape[2:]
    for method in CONTROL_MAPS:
        if method in settings.controls:
            indices = [block.indices[place] for place in items.image.tolist()]
            saliency = control_maps(method, indices, size, settings.seed).to(model.device)
            maps |= {(method, pooling, False): saliency for pooling in poolings}
    for key, saliency in maps.items():
        check_saliency(saliency, len(items.target), key[0])
    if "area" in settings.controls:
        area = map_area(maps[reference_map(settings)], items.images.shape[2:])
        for (method, pooling, _), saliency in list(maps.items()):
            maps[method, pooling, True] = match_area(saliency, area, items.images.shape[2:])
    return maps


def reference_map(settings: EvaluationSettings) -> tuple[str, str, bool]:
    """The map whose area the others are matched to, and the method they are compared with: Grad-CAM under GAP, or,
    where the settings lack one or the other, their first."""
    method = "grad_cam" if "grad_cam" in settings.methods else settings.methods[0]
    return method, "gap" if "gap" in settings.poolings else settings.poolings[0], False


def check_saliency(saliency: torch.Tensor, num_items: int, method: str) -> None:
    """Refuse what is not one map an item.

    Raises:
        ValueError: on another shape, or values that are NaN or outside [0, 1].
    """
    if saliency.ndim != 3 or len(saliency) != num_items:
        raise ValueError(
            f"saliency of {method} has the shape {tuple(saliency.shape)}: give ({num_items}, height, width), one map an image."
        )
    if not ((saliency >= 0) & (saliency <= 1 + 1e-6)).all():
        raise ValueError(f"saliency of {method} holds NaN or values outside [0, 1]: scale every map to [0, 1].")


@dataclass
class MapScores:
    """What the network says of the images that one map masks or perturbs; `None` where it was not asked.

    Args:
        saliency: upsampled, (num_items, height, width).
        masked: scores of the masked images.
        curves: for each of insertion and deletion, by scoring, (num_items, points).
        perturbed: for each perturbation, the predicted classes by scoring, (num_items, fractions).
    """

    saliency: torch.Tensor
    masked: Scores | None
    curves: dict[str, dict[str, torch.Tensor]]
    perturbed: dict[str, dict[str, torch.Tensor]]


@dataclass
class CurveEnds:
    """The ends of insertion and deletion, which all maps of an image share: images, and the target's probabilities."""

    images: dict[str, tuple[torch.Tensor, torch.Tensor]]
    probability: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def score_curve_ends(scorer: Scorer, items: Items) -> CurveEnds:
    """Blur the images and score what insertion starts from and what deletion ends at."""
    settings = scorer.settings
    start = insertion_start(items.pixel_values, settings.protocol)
    end = deletion_end(items.pixel_values, start, settings.protocol)
    full = items.before.probability
    images = {"insertion": (start, items.pixel_values), "deletion": (items.pixel_values, end)}
    blurred = scorer.score(start, items.target).probability
    erased = blurred if end is start else _score_constant(scorer, end, items.target)
    return CurveEnds(images, {"insertion": (blurred, full), "deletion": (full, erased)})


def _score_constant(scorer: Scorer, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Probabilities of images that are all the same: one pass of one image."""
    features = scorer.features(images[:1])
    return {scoring: scorer.probabilities(features, scoring)[0, target] for scoring in scorer.scorings}


def score_map(scorer: Scorer, items: Items, saliency: torch.Tensor, ends: CurveEnds | None, mean, std) -> MapScores:
    """Mask and perturb the items' images by a map and score them; without `ends` only mask."""
    settings = scorer.settings
    upsampled = upsample_saliency(saliency, items.images.shape[2:])
    scores = MapScores(upsampled, None, {}, {})
    if set(settings.metrics) & set(MASKING_METRICS):
        scores.masked = scorer.score(mask_images(items.images, upsampled, mean, std), items.target)
    if ends is None:
        return scores
    chunk = max(1, settings.batch_size // len(items.target))
    if set(settings.metrics) & set(CURVE_METRICS):
        order = saliency_order(upsampled, settings.protocol)
        for name in CURVE_METRICS:
            if name in settings.metrics:
                inner = _score_points(scorer, inner_points(*ends.images[name], order, chunk), items.target)[0]
                first, last = ends.probability[name]
                scores.curves[name] = {
                    scoring: torch.cat([first[scoring][:, None], inner[scoring], last[scoring][:, None]], 1)
                    for scoring in scorer.scorings
                }
    for name in PERTURBATION_METRICS:
        if name in settings.metrics:
            positive = name == "positive_perturbation"
            points = perturbation_images(items.images, pixel_order(upsampled), mean, std, positive, chunk)
            scores.perturbed[name] = _score_points(scorer, points, items.target)[1]
    return scores


def _score_points(scorer: Scorer, points: Iterator[torch.Tensor], target: torch.Tensor) -> tuple[dict, dict]:
    """Probabilities and predicted classes, each by scoring (num_items, points)."""
    scores = [scorer.score(chunk.flatten(0, 1), target.repeat(len(chunk))) for chunk in points]
    return tuple(
        {
            scoring: torch.cat([getattr(one, name)[scoring].view(-1, len(target)) for one in scores]).T
            if scores
            else torch.empty(len(target), 0, device=target.device)
            for scoring in scorer.scorings
        }
        for name in ("probability", "predicted")
    )


def score_maps(scorer: Scorer, items: Items, maps: dict, mean, std) -> dict[tuple[str, str, bool], MapScores]:
    """Score all maps, equal ones once. Area-matched maps are masked only: the power keeps the order of pixels."""
    settings, scored = scorer.settings, []
    wants_curves = set(settings.metrics) & set((*CURVE_METRICS, *PERTURBATION_METRICS))
    ends = score_curve_ends(scorer, items) if wants_curves else None
    by_key = {}
    for key, saliency in maps.items():
        ends_of_map = None if key[2] else ends
        for other, other_ends, scores in scored:
            if other_ends is ends_of_map and other.shape == saliency.shape and torch.equal(other, saliency):
                by_key[key] = scores
                break
        else:
            by_key[key] = score_map(scorer, items, saliency, ends_of_map, mean, std)
            scored.append((saliency, ends_of_map, by_key[key]))
    return by_key


def randomization_correlation(
    scorer: Scorer, items: Items, maps: dict[tuple[str, str, bool], torch.Tensor]
) -> dict[tuple[str, str], list[float]]:
    """Rank correlation of each method's maps with those after shuffling the classifier's weights."""
    settings = scorer.settings
    features = items.features
    twin = shuffled_classifier(scorer.model, settings.seed)
    shuffled = Features(twin, features.pixel_values, features.feature_maps, features.cls_token)
    correlations = {}
    for method in settings.methods:
        after = explain_features(shuffled, items.target, method, list(settings.poolings))
        for pooling in settings.poolings:
            before = maps[method, pooling, False]
            correlations[method, pooling] = rank_correlation(before, after[pooling]).tolist()
    return correlations


def evaluate_block(scorer: Scorer, block: Block, mean, std) -> tuple[list[dict], dict]:
    """Evaluate a block.

    Args:
        mean, std: of the network's input, one value a channel (`Preprocessor`).

    Returns:
        The per-image rows, and the maps by `Row.map_key` of each image's first item, on the CPU.
    """
    settings = scorer.settings
    items = read_items(scorer, block)
    maps = compute_maps(scorer.model, items, block, settings)
    scores = score_maps(scorer, items, maps, mean, std)
    correlations = randomization_correlation(scorer, items, maps) if "randomization" in settings.controls else {}
    rows = []
    for row in table_rows(settings):
        columns = _row_columns(row, scorer, items, scores[row.map_key], block)
        columns["empty_map"] = empty_maps(maps[row.map_key]).tolist()
        if row.control == "" and (row.method, row.pooling) in correlations:
            columns["randomization_correlation"] = correlations[row.method, row.pooling]
        fixed = {"method": row.method, "pooling": row.pooling, "control": row.control, "scoring": row.scoring}
        rows += [fixed | {name: values[item] for name, values in columns.items()} for item in range(len(items.target))]
    first = torch.searchsorted(items.image, torch.arange(len(block.ids), device=items.image.device)).cpu()
    return rows, {key: saliency.cpu()[first] for key, saliency in maps.items()}


def _row_columns(row: Row, scorer: Scorer, items: Items, scores: MapScores, block: Block) -> dict[str, list]:
    """Columns of the per-image table for one row of the results: lists with a value an item."""
    settings, places = scorer.settings, items.image.tolist()
    before = items.before.probability[row.scoring].cpu()
    predicted = items.before.predicted[row.scoring].tolist()
    columns = {
        "index": [block.indices[place] for place in places],
        "id": [block.ids[place] for place in places],
        "target": items.target.tolist(),
        "predicted": predicted,
        "correct": [
            predicted[item] in block.labels[place] if block.labels[place] else None for item, place in enumerate(places)
        ],
        "probability": before.tolist(),
        "map_area": scores.saliency.mean((1, 2)).tolist(),
    }
    if scores.masked is not None:
        after = scores.masked.probability[row.scoring].cpu()
        columns["probability_masked"] = after.tolist()
        for name in MASKING_METRICS:
            if name in settings.metrics:
                columns[name] = MASKING_FUNCTIONS[name](after, before, average=False)
    for name, by_scoring in scores.curves.items():
        curve = by_scoring[row.scoring].cpu()
        columns[f"{name}_curve"] = curve.tolist()
        columns[name] = CURVE_FUNCTIONS[name](curve.numpy(), average=False)
    for name, by_scoring in scores.perturbed.items():
        classes = by_scoring[row.scoring].cpu().numpy()
        columns[name] = PERTURBATION_FUNCTIONS[name](classes, items.target.cpu().numpy(), average=False)
    if "sparsity" in settings.metrics:
        columns["sparsity"] = sparsity(scores.saliency).tolist()
    if set(settings.metrics) & set(MASK_METRICS):
        columns |= _mask_columns(scores.saliency.cpu(), [block.masks[place] for place in places], settings)
    return columns


def _mask_columns(saliency: torch.Tensor, masks: list, settings: EvaluationSettings) -> dict[str, list]:
    """Localisation in percent, None for images without a mask or with the object cropped away."""
    known = [item for item, mask in enumerate(masks) if mask is not None and mask.any()]
    columns = {name: [None] * len(masks) for name in MASK_METRICS if name in settings.metrics}
    if not known:
        return columns
    saliency, mask = saliency[known], torch.stack([masks[item] for item in known])
    values = {
        "mask_share": mask_share_percent(mask_share(saliency, mask), average=False),
        "pointing_game": pointing_game(pointing_hit(saliency, mask).double(), average=False),
    }
    for name, column in columns.items():
        for item, value in zip(known, values[name], strict=True):
            column[item] = value
    return columns
