"""The losses, by plain loops."""

import math

import pytest
import torch
from castream.training.objective import Objective, attention_entropy, random_masks

from modeling_castream import CAStreamConfig, CAStreamForImageClassification


def make(tiny_model, labels_kind="single", objective="cross_entropy", **settings) -> Objective:
    model = CAStreamForImageClassification.from_pretrained(tiny_model).double()
    torch.manual_seed(3)
    for parameter in model.castream.stream.parameters():
        parameter.data.normal_(std=0.3)
    model.config.freeze_classifier = True
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
