"""From a block of images to the rows of the per-image table.

One backbone pass of the images serves every method and pooling. Every masked or perturbed image passes the backbone
once, too, and is scored under all poolings and controls that need it; maps that are equal, such as the raw attention
under either pooling, share their masked images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch

from modeling_castream.features_castream import Features, evaluating
from modeling_castream.methods_castream import METHODS
from modeling_castream.saliency_castream import empty_maps, explain_features

from .controls import control_maps, map_area, match_area, rank_correlation, shuffled_classifier
from .data import Block
from .localization import mask_share, pixel_precision, pointing_hit, sparsity
from .masking import (
    changes,
    deletion_end,
    inner_points,
    insertion_start,
    mask_images,
    perturbation_images,
    pixel_order,
    saliency_order,
    upsample_saliency,
)
from .metrics.average_drop.average_drop import average_drop
from .metrics.average_gain.average_gain import average_gain
from .metrics.average_increase.average_increase import average_increase
from .metrics.deletion.deletion import deletion
from .metrics.insertion.insertion import insertion
from .metrics.kept.kept import kept
from .metrics.mask_share.mask_share import mask_share as mask_share_percent
from .metrics.negative_perturbation.negative_perturbation import negative_perturbation
from .metrics.pixel_average_precision.pixel_average_precision import pixel_average_precision
from .metrics.pointing_game.pointing_game import pointing_game
from .metrics.positive_perturbation.positive_perturbation import positive_perturbation
from .scorer import Scorer, Scores
from .settings import (
    CONTROL_MAPS,
    CURVE_METRICS,
    MASKING_METRICS,
    PERTURBATION_METRICS,
    PROBABILITY_METRICS,
    EvaluationSettings,
)
from .table import Row, reference_map, table_rows

PROBABILITY_FUNCTIONS = {
    "average_drop": average_drop,
    "average_gain": average_gain,
    "average_increase": average_increase,
}
CURVE_FUNCTIONS = {"insertion": insertion, "deletion": deletion}
# of maps and masks, and the metric of what it returns
LOCALIZATION_FUNCTIONS = {
    "mask_share": (mask_share, mask_share_percent),
    "pointing_game": (pointing_hit, pointing_game),
    "pixel_average_precision": (pixel_precision, pixel_average_precision),
}
PERTURBATION_FUNCTIONS = {
    "positive_perturbation": positive_perturbation,
    "negative_perturbation": negative_perturbation,
}


@dataclass
class Items:
    """What is explained: one item per positive label, in the order of the block's images; a single logit is explained
    whichever of its two labels, 0 or 1, an image has.

    Args:
        image: place of each item's image within the block, (num_items,).
        target: its class, (num_items,).
        answer: what the network should predict, (num_items,): the target; of a single logit the label, 0 or 1.
        pixel_values, images: of each item.
        features: of each item, from one backbone pass per image.
        before: scores of the unmasked images.
    """

    image: torch.Tensor
    target: torch.Tensor
    answer: torch.Tensor
    pixel_values: torch.Tensor
    images: torch.Tensor
    features: Features
    before: Scores


def read_items(scorer: Scorer, block: Block) -> Items:
    """The backbone pass of a block, and its items."""
    settings, device = scorer.settings, scorer.model.device
    pixel_values = block.pixel_values.to(device)
    features = scorer.features(pixel_values)
    predicted = scorer.explained(scorer.probabilities(features)[settings.poolings[0]]).tolist()
    answers = [
        labels if labels and settings.target == "label" else [predicted[place]]
        for place, labels in enumerate(block.labels)
    ]
    image = torch.tensor([place for place, labels in enumerate(answers) for _ in labels], device=device)
    answer = torch.tensor(list(chain.from_iterable(answers)), device=device)
    target = torch.zeros_like(answer) if scorer.single_logit else answer
    if len(image) != len(pixel_values):  # several labels per image
        features, pixel_values = features.select(image), pixel_values[image]
    images = block.images.to(device)[image]
    return Items(image, target, answer, pixel_values, images, features, scorer.score_features(features, target))


def compute_maps(scorer: Scorer, items: Items, block: Block) -> dict[tuple[str, str, bool], torch.Tensor]:
    """Every map of the table, (num_items, height, width) in [0, 1] at its own resolution, by `Row.map_key`."""
    settings, maps = scorer.settings, {}
    poolings = list(settings.poolings)
    for method in settings.methods:
        by_pooling = _explain(scorer, items.features, items.target, method)
        maps |= {(method, pooling, False): by_pooling[pooling] for pooling in poolings}
    size = items.features.feature_maps[-1].shape[2:]
    for method in CONTROL_MAPS:
        if method in settings.controls:
            indices = [block.indices[place] for place in items.image.tolist()]
            saliency = control_maps(method, indices, size, settings.seed).to(scorer.model.device)
            maps |= {(method, pooling, False): saliency for pooling in poolings}
    for key, saliency in maps.items():
        check_saliency(saliency, len(items.target), key[0])
    if "area" in settings.controls:
        area = map_area(maps[reference_map(settings)], items.images.shape[2:])
        for (method, pooling, _), saliency in list(maps.items()):
            maps[method, pooling, True] = match_area(saliency, area, items.images.shape[2:])
    return maps


def _explain(scorer: Scorer, features: Features, target: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """Maps by pooling, at the resolution of the method's feature map; masks are applied in pixel space.

    For the predicted class a method that needs no target gives what it gives of itself: evidence weighs the classes as
    the prediction does.
    """
    settings = scorer.settings
    options = {"image_mean": scorer.mean, "image_std": scorer.std, "chunk_size": settings.batch_size}
    given = target if settings.target != "predicted" or METHODS[method].needs_target else None
    return explain_features(features, given, method, list(settings.poolings), **options)


def check_saliency(saliency: torch.Tensor, num_items: int, method: str) -> None:
    """Refuse what is not one map an item.

    Raises:
        ValueError: on another shape, or values that are NaN or outside [0, 1].
    """
    if saliency.ndim != 3 or len(saliency) != num_items:
        raise ValueError(
            f"saliency of {method} has the shape {tuple(saliency.shape)}: give ({num_items}, height, width), "
            "one map an image."
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
    if end is start:
        erased = blurred
    elif changes(settings.protocol, "blurred_deletion"):
        erased = scorer.score(end, items.target).probability
    else:
        erased = _score_constant(scorer, end, items.target)
    return CurveEnds(images, {"insertion": (blurred, full), "deletion": (full, erased)})


def _score_constant(scorer: Scorer, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Probabilities of images that are all the same: one pass of one image."""
    by_scoring = scorer.probabilities(scorer.features(images[:1]))
    return {scoring: probabilities[0, target] for scoring, probabilities in by_scoring.items()}


def score_map(scorer: Scorer, items: Items, saliency: torch.Tensor, ends: CurveEnds | None) -> MapScores:
    """Mask and perturb the items' images by a map and score them; without `ends` only mask.

    A map's masked images pass by themselves, in a batch as large as that of the unmasked ones: another size may change
    the last bits of a convolution, and a map of ones would then increase the probability of every other image.
    """
    settings = scorer.settings
    upsampled = upsample_saliency(saliency, items.images.shape[2:])
    scores = MapScores(upsampled, None, {}, {})
    if set(settings.metrics) & set(MASKING_METRICS):
        masked = mask_images(items.images, upsampled, scorer.mean, scorer.std)
        scores.masked = scorer.score(masked, items.target, upsampled)
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
            order = pixel_order(upsampled)
            points = perturbation_images(items.images, order, scorer.mean, scorer.std, positive, chunk)
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


def score_maps(scorer: Scorer, items: Items, maps: dict) -> dict[tuple[str, str, bool], MapScores]:
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
            by_key[key] = score_map(scorer, items, saliency, ends_of_map)
            scored.append((saliency, ends_of_map, by_key[key]))
    return by_key


def randomization_correlation(
    scorer: Scorer, items: Items, maps: dict[tuple[str, str, bool], torch.Tensor]
) -> dict[tuple[str, str], list[float]]:
    """Rank correlation of each method's maps with those after shuffling the classifier's weights."""
    settings = scorer.settings
    features = items.features
    twin = shuffled_classifier(scorer.model, settings.seed)
    shuffled = replace(features, model=twin, _pooled={})
    correlations = {}
    for method in settings.methods:
        after = _explain(scorer, shuffled, items.target, method)
        for pooling in settings.poolings:
            before = maps[method, pooling, False]
            correlations[method, pooling] = rank_correlation(before, after[pooling])
    return correlations


def evaluate_block(scorer: Scorer, block: Block) -> tuple[list[dict], dict]:
    """Evaluate a block.

    Returns:
        The per-image rows, and the maps by `Row.map_key` of each image's first item, on the CPU; CA's raw attention is
        among them though no row may need it.
    """
    settings = scorer.settings
    with evaluating(scorer.model):
        items = read_items(scorer, block)
        maps = compute_maps(scorer, items, block)
        scores = score_maps(scorer, items, maps)
        correlations = randomization_correlation(scorer, items, maps) if "randomization" in settings.controls else {}
        if "ca" in settings.poolings and "raw_attention" not in settings.methods:  # it is in the picture all the same
            attention = _explain(scorer, items.features, items.target, "raw_attention")["ca"]
            maps["raw_attention", "ca", False] = attention
    rows, localization = [], _localize(scores, items, block, settings)
    for row in table_rows(settings):
        columns = _row_columns(row, scorer, items, scores[row.map_key], block) | localization[id(scores[row.map_key])]
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
        for name in PROBABILITY_METRICS:
            if name in settings.metrics:
                columns[name] = PROBABILITY_FUNCTIONS[name](after, before, average=False)
        if "kept" in settings.metrics:
            top, top_before = (found.predicted[row.scoring].cpu() for found in (scores.masked, items.before))
            columns["kept"] = kept(top, top_before, average=False)
    if row.scoring == "ca_bound":  # of the other metrics' images none shows a mask
        return columns
    for name, by_scoring in scores.curves.items():
        curve = by_scoring[row.scoring].cpu()
        columns[f"{name}_curve"] = curve.tolist()
        columns[name] = CURVE_FUNCTIONS[name](curve.numpy(), average=False)
    for name, by_scoring in scores.perturbed.items():
        classes = by_scoring[row.scoring].cpu().numpy()
        columns[name] = PERTURBATION_FUNCTIONS[name](classes, items.answer.cpu().numpy(), average=False)
    if "sparsity" in settings.metrics:
        columns["sparsity"] = sparsity(scores.saliency).tolist()
    return columns


def _localize(scores: dict, items: Items, block: Block, settings: EvaluationSettings) -> dict[int, dict[str, list]]:
    """Localisation of each map once, by the id of its scores, which poolings share."""
    masks = [block.masks[place] for place in items.image.tolist()]
    distinct = {id(one): one for one in scores.values()}
    return {key: _localization_columns(one.saliency.cpu(), masks, settings) for key, one in distinct.items()}


def _localization_columns(saliency: torch.Tensor, masks: list, settings: EvaluationSettings) -> dict[str, list]:
    """Localisation in percent, None for images without a mask or with the object cropped away."""
    known = [item for item, mask in enumerate(masks) if mask is not None and mask.any()]
    columns = {name: [None] * len(masks) for name in settings.localization_metrics}
    if not known:
        return columns
    saliency, mask = saliency[known], torch.stack([masks[item] for item in known])
    for name, column in columns.items():
        measure, to_percent = LOCALIZATION_FUNCTIONS[name]
        for item, value in zip(known, to_percent(measure(saliency, mask).double(), average=False), strict=True):
            column[item] = value
    return columns
