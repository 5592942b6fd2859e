"""The losses, by plain loops."""

import math

import pytest
import torch
from castream.data.masks import draw_backgrounds, draw_masks, scale_to_unit
from castream.training.objective import (
    Objective,
    attention_entropy,
    describe_predictions,
    explained_variance,
    kept_out,
    random_masks,
)
from transformers import ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification


def make(tiny_model, labels_kind="single", objective="cross_entropy", **settings) -> Objective:
    model = CAStreamForImageClassification.from_pretrained(tiny_model).double()
    torch.manual_seed(3)
    for parameter in model.castream.stream.parameters():
        parameter.data.normal_(std=0.3)
    model.config.freeze_classifier = True
    model.freeze()
    model.train()
    if labels_kind == "multi":
        model.config.problem_type = "multi_label_classification"
    return Objective(model, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], objective, **settings).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "noise": torch.randn(5, 4, 4, generator=generator),
        "labels": torch.tensor([0, 1, 2, 1, 0]),
    }


def features_of(objective, batch):
    """Features in float64, with the pixels made as the module says."""
    found = objective.extract(batch | {"images": batch["images"]})
    return {kind: (tuple(value.double() for value in maps), cls) for kind, (maps, cls) in found.items()}


def logits_of(objective, features, pooling):
    pooled, _ = objective.model.castream.pool_features(features[0], pooling)
    return objective.model.classify(pooled, features[1]).float()


def softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_cross_entropy_with_label_smoothing(tiny_model, batch):
    objective = make(tiny_model, label_smoothing=0.1)
    features = features_of(objective, batch)
    logits = logits_of(objective, features["view"], "ca").tolist()
    expected = 0.0
    for row, label in zip(logits, batch["labels"].tolist(), strict=True):
        for index, probability in enumerate(softmax(row)):
            target = 0.1 / 3 + (0.9 if index == label else 0)
            expected -= target * math.log(probability)
    result = objective(batch | {"features": features})
    assert result["loss"].item() == pytest.approx(expected, rel=1e-5)
    hits = sum(row.index(max(row)) == label for row, label in zip(logits, batch["labels"].tolist(), strict=True))
    assert result["accuracy"].item() == hits


def test_distill_and_masked_distill(tiny_model, batch):
    features = features_of(make(tiny_model, objective="masked_distill"), batch)
    objective = make(tiny_model, objective="masked_distill")
    teacher = logits_of(objective, features["view"], "gap").tolist()
    student = logits_of(objective, features["view"], "ca").tolist()
    masked = logits_of(objective, features["masked"], "ca").tolist()
    divergence = supervised = 0.0
    for t_row, s_row, m_row in zip(teacher, student, masked, strict=True):
        t, s, m = softmax(t_row), softmax(s_row), softmax(m_row)
        divergence += sum(p * (math.log(p) - math.log(q)) for p, q in zip(t, s, strict=True))
        supervised -= math.log(m[t.index(max(t))])
    unlabelled = {"features": features}
    plain = make(tiny_model, objective="distill")
    assert plain(unlabelled)["loss"].item() == pytest.approx(divergence, rel=1e-4)
    assert objective(unlabelled)["loss"].item() == pytest.approx(divergence + supervised, rel=1e-4)


def test_several_labels_per_image(tiny_model, batch):
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).float()
    objective = make(tiny_model, "multi", objective="masked_distill")
    features = features_of(objective, batch)

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    teacher, student, masked = (
        logits_of(objective, features[kind], pooling).tolist()
        for kind, pooling in (("view", "gap"), ("view", "ca"), ("masked", "ca"))
    )
    expected = 0.0
    for rows in zip(teacher, student, masked, strict=True):
        for t, s, m in zip(*rows, strict=True):
            p, q, r = sigmoid(t), sigmoid(s), sigmoid(m)
            expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            expected -= p * math.log(r) + (1 - p) * math.log(1 - r)
    assert objective({"features": features})["loss"].item() == pytest.approx(expected / 3, rel=1e-4)
    supervised = make(tiny_model, "multi")
    expected = 0.0
    for row, target in zip(student, labels.tolist(), strict=True):
        for s, y in zip(row, target, strict=True):
            expected -= y * math.log(sigmoid(s)) + (1 - y) * math.log(1 - sigmoid(s))
    result = supervised({"features": features, "labels": labels})
    assert result["loss"].item() == pytest.approx(expected / 3, rel=1e-4)


@pytest.fixture
def one_logit(tiny_model, tmp_path):
    """Makes an Objective of a network with a single logit."""

    def make_one(problem_type, objective):
        config = CAStreamConfig.from_pretrained(tiny_model, id2label={0: "cat"}, label2id={"cat": 0})
        config.problem_type = problem_type
        torch.manual_seed(0)
        CAStreamForImageClassification(config).save_pretrained(tmp_path / "one")
        return make(tmp_path / "one", objective=objective)

    return make_one


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_a_single_logit_is_a_sigmoids(one_logit, batch, problem_type):
    objective = one_logit(problem_type, "distill")
    features = features_of(objective, batch)
    teacher, student = (logits_of(objective, features["view"], pooling)[:, 0].tolist() for pooling in ("gap", "ca"))
    expected = hits = divergence = 0.0
    for t, s, label in zip(teacher, student, [0, 1, 1, 0, 1], strict=True):
        p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        divergence += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        expected -= math.log(q if label else 1 - q)
        hits += (q > 0.5) == bool(label)
    assert divergence > 1e-6 and objective({"features": features})["loss"].item() == pytest.approx(divergence, rel=1e-4)
    result = one_logit(problem_type, "cross_entropy")({"features": features, "labels": torch.tensor([0, 1, 1, 0, 1])})
    assert (result["loss"].item(), result["accuracy"].item()) == (pytest.approx(expected, rel=1e-5), hits)


def test_a_regression_follows_its_teacher_by_squared_errors(one_logit, batch):
    features = features_of(one_logit("regression", "masked_distill"), batch)
    objective = one_logit("regression", "masked_distill")
    teacher, student = (logits_of(objective, features["view"], pooling)[:, 0].tolist() for pooling in ("gap", "ca"))
    masked = logits_of(objective, features["masked"], "ca")[:, 0].tolist()
    expected = sum((t - s) ** 2 for t, s in zip(teacher, student, strict=True))
    assert one_logit("regression", "distill")({"features": features})["loss"].item() == pytest.approx(
        expected, rel=1e-4
    )
    expected += sum((t - m) ** 2 for t, m in zip(teacher, masked, strict=True))
    assert objective({"features": features})["loss"].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="needs classes, and the model is a regression"):
        one_logit("regression", "cross_entropy")


def test_class_ids_of_a_network_with_several_labels_are_one_hot(tiny_model, batch):
    objective = make(tiny_model, "multi")
    features = features_of(objective, batch)
    one_hot = torch.eye(3)[batch["labels"]]
    ids, vectors = (objective({"features": features, "labels": labels}) for labels in (batch["labels"], one_hot))
    assert torch.equal(ids["loss"], vectors["loss"]) and torch.equal(ids["accuracy"], vectors["accuracy"])


def test_the_teacher_gets_no_gradient_and_the_backbone_runs_without_graph(tiny_model, batch):
    objective = make(tiny_model, objective="masked_distill").float()
    result = objective(batch)
    result["loss"].backward()
    moved = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert moved and all(".stream." in name for name in moved)
    assert not any(maps.requires_grad for maps in objective.extract(batch)["view"][0])


def test_summed_loss_of_a_batch_is_that_of_its_images(tiny_model, batch):
    objective = make(tiny_model, objective="masked_distill").float()
    whole = objective(batch)
    alone = [objective({name: value[i : i + 1] for name, value in batch.items()}) for i in range(5)]
    for name in ("loss", "accuracy", "entropy"):
        torch.testing.assert_close(sum(one[name] for one in alone), whole[name], rtol=1e-4, atol=1e-5)


def test_entropy_is_one_where_uniform_and_zero_where_not():
    uniform = torch.full((2, 3, 4, 5), 1 / 20)
    single = torch.zeros(2, 1, 4, 5)
    single[..., 1, 2] = 1
    assert attention_entropy((uniform, single)).tolist() == pytest.approx([2.0, 0.0])
    half = torch.zeros(1, 1, 2, 2)
    half[..., 0, :] = 0.5
    assert attention_entropy((half,)).item() == pytest.approx(math.log(2) / math.log(4))


def test_random_masks_span_zero_to_one():
    masks = random_masks(torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0)), (7, 7), (70, 70))
    assert masks.shape == (16, 1, 70, 70)
    assert masks.min() == 0 and masks.max() <= 1 and masks.amax((1, 2, 3)).min() > 0.9


def test_views_are_normalised_as_the_processor_does(tiny_model, batch):
    objective = make(tiny_model).float()
    pixels = batch["images"].float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(objective.normalize(batch["images"]), (pixels - mean) / std)
    masks = torch.rand(len(pixels), 1, *pixels.shape[2:], generator=torch.Generator().manual_seed(0))
    masked = objective.normalize(batch["images"], masks)
    torch.testing.assert_close(masked, (pixels * masks - mean) / std)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.normalize(batch["images"], masks), masked.bfloat16())
    assert masked.is_contiguous(memory_format=torch.channels_last)


def evidence_model(problem_type: str | None = None) -> CAStreamForImageClassification:
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    options = {
        "num_labels": 3,
        "variant": "final",
        "evidence_queries": ["memory", "constant"],
        "freeze_classifier": True,
    }
    config = CAStreamConfig(backbone_config=backbone, problem_type=problem_type, **options)
    return CAStreamForImageClassification(config).train()


def fidelity_objective(**settings) -> Objective:
    settings = {
        "mask_kinds": ["soft", "salient", "complement", "blob"],
        "mask_backgrounds": ["black", "grey"],
    } | settings
    return Objective(evidence_model(), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], "mass_fidelity", **settings)


def test_what_survives_of_a_prediction_is_measured_on_the_masked_views(batch):
    """Each r_k from the masked image itself: masked in pixel space, normalised, run by itself."""
    objective = fidelity_objective()
    model, batch = objective.model.eval(), batch | {"seed": torch.arange(5)}
    (kept, survival), _ = objective.extract(batch)["fidelity"]
    assert kept.shape == (5, 4, 8, 8) and survival.shape == (5, 2, 4)
    pixels = batch["images"].float() / 255
    normalized = (pixels - objective.mean) / objective.std
    clean = model(normalized, pooling="gap").logits.softmax(-1)
    feature_map = model.castream.extract_features(normalized)[0][-1]
    direction = model.classifier.weight[clean.argmax(-1)]
    cosine = torch.nn.functional.cosine_similarity(feature_map, direction[:, :, None, None]).relu()
    masks = draw_masks(batch["seed"], scale_to_unit(cosine), objective.mask_kinds, (32, 32))
    chosen = draw_backgrounds(batch["seed"], 4, objective.mask_backgrounds)
    for item in range(5):
        for number in range(4):
            mask, background = masks[item, number], (0.0, 0.5)[chosen[item, number]]
            masked = pixels[item] * mask + background * (1 - mask)
            after = model(((masked - objective.mean) / objective.std)[None], pooling="gap").logits.softmax(-1)[0]
            before, top = clean[item], clean[item].argmax()
            divergence = sum((p * (p / q).log()).item() for p, q in zip(before, after, strict=True))
            expected = [min((after[top] / before[top]).item(), 1.0), math.exp(-divergence)]
            torch.testing.assert_close(survival[item, :, number], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_mass_fidelity_is_the_cross_entropy_of_what_survives_by_the_mass_that_is_kept(batch):
    objective = fidelity_objective()
    with torch.no_grad():
        for parameter in objective.surrogates.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model, batch = objective.model, batch | {"seed": torch.arange(5)}
    features = objective.extract(batch)
    (feature_maps, _), ((kept, survival), _) = features["view"], features["fidelity"]
    logits = {pooling: logits_of(objective, features["view"], pooling) for pooling in ("gap", "ca")}
    masked = logits_of(objective, features["masked"], "ca")
    expected = 0.0
    for student in (logits["ca"], masked):
        for teacher_row, row in zip(logits["gap"].tolist(), student.tolist(), strict=True):
            expected += sum(p * math.log(p / q) for p, q in zip(softmax(teacher_row), softmax(row), strict=True))
    known = describe_predictions(feature_maps[-1].mean((2, 3)), logits["gap"].softmax(-1))
    for target, query in enumerate(("memory", "constant")):
        scores = model.evidence_scores(query, model.castream.evidence_features(feature_maps))
        for item in range(5):
            evidence = softmax(scores[item].flatten().tolist())
            log_alpha, beta = objective.surrogates[query].linear(known[item]).tolist()
            for number in range(4):
                mass = sum(e * m for e, m in zip(evidence, kept[item, number].flatten().tolist(), strict=True))
                probability = 1 / (1 + math.exp(beta - math.exp(log_alpha) * mass))
                r = survival[item, target, number].item()
                expected -= (r * math.log(probability) + (1 - r) * math.log(1 - probability)) / 4
    assert objective({"features": features})["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_mass_fidelity_trains_evidence_stream_and_surrogates_only(batch):
    objective = fidelity_objective()
    result = objective(batch | {"seed": torch.arange(5)})
    assert result["fidelity"].shape == (2, 4)
    result["loss"].backward()
    moved = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert all(name.startswith(("model.evidence.", "model.castream.stream.", "surrogates.")) for name in moved)
    assert {"model.evidence.memory.bias", "model.castream.stream.query", "surrogates.constant.linear.bias"} <= moved


def test_the_stream_learns_from_one_masked_view_of_each_kind_in_turn(batch):
    objective = fidelity_objective()
    seeds = torch.tensor([0, 1, 2, 3, 6])
    features = objective.extract(batch | {"seed": seeds})
    clean, masked = (objective._teacher(features[kind]) for kind in ("view", "masked"))
    survival = features["fidelity"][0][1]
    which = seeds % survival.shape[2]
    torch.testing.assert_close(objective._survival(clean, masked), survival[torch.arange(5), :, which])


def test_photos_kept_out_of_mass_fidelity_give_no_gradient_and_tell_how_well_it_predicts(batch):
    objective = fidelity_objective()
    keys = [f"0:{number}" for number in range(100)]
    chosen = [key for key, out in zip(keys, kept_out(keys, 100).tolist(), strict=True) if out]
    assert 4 <= len(chosen) <= 20 and not kept_out([], 3).any()
    others = [key for key in keys if key not in chosen]
    features = objective.extract(batch | {"seed": torch.arange(5)})
    all_out = objective({"features": features, "keys": chosen[:1] * 5})
    none_out = objective({"features": features, "keys": others[:5]})
    assert torch.equal(none_out["fidelity"], torch.zeros(2, 4))
    all_out["loss"].backward()
    assert all(not parameter.grad.any() for parameter in objective.surrogates.parameters())

    survival = features["fidelity"][0][1]
    count, total, squares, _ = all_out["fidelity"][0].tolist()
    assert (count, total) == (survival[:, 0].numel(), pytest.approx(survival[:, 0].sum().item(), rel=1e-5))
    assert squares == pytest.approx(survival[:, 0].square().sum().item(), rel=1e-5)
    first_three, last_two = (
        objective({"features": take(features, part), "keys": chosen[:1] * len(part)})["fidelity"]
        for part in ([0, 1, 2], [3, 4])
    )
    torch.testing.assert_close(first_three + last_two, all_out["fidelity"])


def take(features, items):
    """The items of extracted features."""
    parts = {kind: tuple(one[items] for one in maps) for kind, (maps, _) in features.items()}
    return {kind: (maps, None) for kind, maps in parts.items()}


def test_explained_variance_by_hand():
    values, predictions = [1.0, 0.0, 1.0, 0.0], [0.75, 0.25, 0.75, 0.25]
    errors = sum((value - prediction) ** 2 for value, prediction in zip(values, predictions, strict=True))
    assert explained_variance(4, sum(values), sum(value**2 for value in values), errors) == pytest.approx(0.75)
    assert math.isnan(explained_variance(2, 2.0, 2.0, 0.5)) and math.isnan(explained_variance(0, 0, 0, 0))


def test_mass_fidelity_is_refused_where_it_means_nothing(tiny_model):
    with pytest.raises(ValueError, match="set evidence_queries"):
        make(tiny_model, objective="mass_fidelity")
    with pytest.raises(ValueError, match="is a regression"):
        Objective(evidence_model("regression"), [0.5] * 3, [0.5] * 3, "mass_fidelity")
