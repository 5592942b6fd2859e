from itertools import pairwise

import numpy as np
import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.block import check_saliency, evaluate_block, read_items, score_curve_ends, score_map
from castream.evaluation.data import Preprocessor, prepare_block, read_examples
from castream.evaluation.scorer import Scorer

from modeling_castream import explain
from modeling_castream.folding_castream import folding
from tests.evaluation.small import MEAN, SIZE, STD, small_examples, small_model, small_processor


def block_of(examples, model):
    rows = [{"index": index, **row} for index, row in enumerate(read_examples(examples))]
    return prepare_block(0, rows, Preprocessor(small_processor()), model.config.num_labels)


def evaluate(examples, model=None, **settings):
    return evaluate_saliency(model or small_model(), small_processor(), examples, EvaluationSettings(**settings))


def count_images(model, monkeypatch):
    """How many images go through the backbone from now on."""
    counts, original = [], model.castream.extract_features

    def extract_features(pixel_values):
        counts.append(len(pixel_values))
        return original(pixel_values)

    monkeypatch.setattr(model.castream, "extract_features", extract_features)
    return counts


@pytest.mark.parametrize("pooling", ["gap", "ca"])
def test_masking_metrics_by_their_definition(pooling):
    """One image after the other, with the model's own forward pass and plain formulas."""
    model, examples = small_model(), small_examples(3)
    metrics = ("average_drop", "average_gain", "average_increase", "mask_share")
    report = evaluate(examples, model, methods=("grad_cam",), poolings=(pooling,), metrics=metrics)
    for example, row in zip(examples, report.part.table.to_pylist(), strict=True):
        pixel_values = small_processor()(example["image"], return_tensors="pt").pixel_values
        saliency = explain(model, pixel_values, [example["label"]], "grad_cam", pooling)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        masked = ((pixel_values * std + mean) * saliency[:, None] - mean) / std
        with torch.no_grad():
            p, o = (
                model(one, pooling=pooling).logits.softmax(-1)[0, example["label"]].item()
                for one in (pixel_values, masked)
            )
        assert abs(p - o) > 1e-3, "a case in which masking changes nothing shows nothing"
        assert row["average_drop"] == pytest.approx(100 * max(p - o, 0) / p, abs=1e-3)
        assert row["average_gain"] == pytest.approx(100 * max(o - p, 0) / (1 - p), abs=1e-3)
        assert row["average_increase"] == 100 * (o > p)
        mask = np.asarray(small_processor()(example["mask"][..., None].repeat(3, 2) * 255.0)["pixel_values"][0])[0] > 0
        share = saliency[0].numpy()[mask].sum() / saliency[0].numpy().sum()
        assert row["mask_share"] == pytest.approx(100 * share, abs=0.5)  # the mask's edge is resampled


@pytest.mark.parametrize(("size", "steps"), [((SIZE, SIZE), 8), ((51, 37), 5), ((40, 64), 5)])
def test_insertion_and_deletion_by_their_definition(size, steps):
    """Pixel sets, blur and trapezoid in plain loops; 51 x 37 pixels take five steps, of which the last is smaller."""
    model, example = small_model(), small_examples(1)[0]
    processor = small_processor()
    processor.crop_size = {"height": size[0], "width": size[1]}
    settings = EvaluationSettings(methods=("grad_cam",), poolings=("ca",), metrics=("insertion", "deletion"))
    row = evaluate_saliency(model, processor, [example], settings).part.table.to_pylist()[0]
    row_0 = {"index": 0, **example}
    pixel_values = prepare_block(
        0, [row_0], Preprocessor(processor), 5
    ).pixel_values  # to the bit: it decides near-ties
    expected = processor(example["image"], return_tensors="pt").pixel_values
    assert pixel_values.shape[2:] == size and torch.allclose(pixel_values, expected, atol=1e-5)
    saliency = explain(model, pixel_values, [example["label"]], "grad_cam", "ca")[0].flatten().tolist()
    order = sorted(range(size[0] * size[1]), key=lambda pixel: (-saliency[pixel], -pixel))
    from castream.evaluation.masking import blur_images

    substrates = {"insertion": (blur_images(pixel_values), pixel_values), "deletion": (pixel_values, 0 * pixel_values)}
    for name, (start, end) in substrates.items():
        curve = []
        for step in range(steps + 1):
            image = start.clone().flatten(2)
            chosen = order[: 8 * max(size) * step]
            image[:, :, chosen] = end.flatten(2)[:, :, chosen]
            with torch.no_grad():
                logits = model(image.view_as(start), pooling="ca").logits
            curve.append(logits.softmax(-1)[0, example["label"]].item())
        np.testing.assert_allclose(row[f"{name}_curve"], curve, atol=1e-5)
        area = sum((first + second) / 2 for first, second in pairwise(curve)) / steps
        assert row[name] == pytest.approx(100 * area, abs=1e-3)


def test_kept_and_localisation_by_their_definition():
    """Kept, from the network's own forward passes: some images keep their class and some do not."""
    model, examples = small_model(), small_examples(8)
    images = torch.cat([small_processor()(row["image"], return_tensors="pt").pixel_values for row in examples])
    with torch.no_grad():  # no class ahead of the others on all images
        model.classifier.bias -= model(images, pooling="gap").logits.mean(0)
    metrics = ("kept", "pixel_average_precision")
    report = evaluate(examples, model, methods=("grad_cam",), poolings=("gap",), metrics=metrics, controls=("area",))
    frame = report.per_image.query("control == ''").reset_index()
    kept = []
    for example, pixel_values, precision in zip(
        examples, images[:, None], frame["pixel_average_precision"], strict=True
    ):
        saliency = explain(model, pixel_values, [example["label"]], "grad_cam", "gap")
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        masked = ((pixel_values * std + mean) * saliency[:, None] - mean) / std
        with torch.no_grad():
            top, after = (model(one, pooling="gap").logits.argmax().item() for one in (pixel_values, masked))
        kept.append(100.0 * (top == after))
        mask = np.asarray(small_processor()(example["mask"][..., None].repeat(3, 2) * 255.0)["pixel_values"][0])[0]
        mask = torch.from_numpy(mask * STD[0] + MEAN[0] > 0.5)  # as evaluation draws the line
        chosen = (saliency[0] >= saliency[0][mask][:, None, None]).flatten(1)
        expected = ((chosen & mask.flatten()).sum(1) / chosen.sum(1)).mean().item()
        assert precision == pytest.approx(100 * expected, abs=0.5)
    assert frame["kept"].tolist() == kept and 0 < np.mean(kept) < 100
    row = next(row for row in report.results["rows"] if row["control"] == "")
    assert row["metrics"]["kept"]["mean"] == np.mean(kept)
    assert "kept ↑ | pixel AP ↑" in report.markdown()


def test_maps_that_poolings_share_are_masked_once(monkeypatch):
    model, examples = small_model(), small_examples(4)
    block = block_of(examples, model)
    counts = count_images(model, monkeypatch)
    settings = EvaluationSettings(methods=("raw_attention",), metrics=("average_drop",), batch_size=4)
    evaluate_block(Scorer(model, settings, MEAN, STD), block)
    assert sum(counts) == 4 + 4  # the images, and each masked once for both poolings


@pytest.mark.parametrize("options", [{}, {"query": "class_specific"}, {"variant": "final"}])
def test_probabilities_are_those_of_the_models_forward_pass(options):
    model = small_model(**options)
    block = block_of(small_examples(3), model)
    probabilities = (scorer := Scorer(model, EvaluationSettings(), MEAN, STD)).probabilities(
        scorer.features(block.pixel_values)
    )
    for pooling in ("gap", "ca"):
        with torch.no_grad(), folding():  # as the evaluation runs it, to the bit
            logits = model(block.pixel_values, pooling=pooling).logits
        assert torch.equal(probabilities[pooling], logits.softmax(-1))


@pytest.mark.parametrize(("protocol", "ends"), [("reference", 4 + 1), ("stable", 4), ("blurred_deletion", 4 + 4)])
def test_curves_take_no_more_passes_than_they_need(protocol, ends, monkeypatch):
    model, examples = small_model(), small_examples(4)
    block = block_of(examples, model)
    counts = count_images(model, monkeypatch)
    settings = EvaluationSettings(
        methods=("grad_cam",),
        metrics=("insertion", "deletion"),
        batch_size=4,
        protocol=protocol,
        controls=("map_only",),
    )
    evaluate_block(Scorer(model, settings, MEAN, STD), block)
    steps = 8
    inner = 2 * (steps - 1) * 4 * 2  # insertion and deletion, four images, a map each for GAP and CA
    assert sum(counts) == 4 + inner + ends  # blurred images, and one mean-coloured image or others of their own
    assert max(counts) == 4


def test_batch_size_changes_no_figure():
    controls = ("random_map", "temperature", "norm", "map_only", "area", "randomization")
    reports = [evaluate(small_examples(5), controls=controls, batch_size=size) for size in (1, 5)]
    singles, batch = (report.part.table.to_pandas() for report in reports)
    assert len(singles) == len(batch) > 5 * 6
    for name in ("average_drop", "average_gain", "map_area"):
        np.testing.assert_allclose(singles[name], batch[name], atol=5e-3)
    # rounding may swap cells that are all but equally salient
    np.testing.assert_allclose(singles["randomization_correlation"], batch["randomization_correlation"], atol=0.05)


def test_how_images_are_batched_changes_no_curve():
    """One image at a time, a partial batch, and several points of the curve at once."""
    model = small_model()
    block = block_of(small_examples(5), model)
    ranks = np.stack([np.random.default_rng(seed).permutation(SIZE * SIZE) for seed in range(5)])
    saliency = torch.from_numpy(ranks.reshape(5, SIZE, SIZE).astype(np.float32) / (SIZE * SIZE))  # without ties
    curves = []
    for batch_size in (1, 3, 16):
        metrics = ("insertion", "deletion", "positive_perturbation")
        scorer = Scorer(model, EvaluationSettings(metrics=metrics, batch_size=batch_size), MEAN, STD)
        items = read_items(scorer, block)
        scores = score_map(scorer, items, saliency, score_curve_ends(scorer, items))
        assert scores.perturbed["positive_perturbation"]["ca"].shape == (5, 9)
        curves.append(torch.cat([scores.curves[name][pooling] for name in metrics[:2] for pooling in ("gap", "ca")]))
    torch.testing.assert_close(curves[0], curves[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(curves[0], curves[2], atol=1e-5, rtol=0)


def test_multi_label_explains_every_positive_label():
    model = small_model(problem_type="multi_label_classification")
    examples = small_examples(3)
    for example, labels in zip(examples, ([0, 3], [1], [2, 3, 4]), strict=True):
        example["label"] = labels
    report = evaluate(examples, model, methods=("grad_cam",), poolings=("ca",), metrics=("average_drop",))
    frame = report.per_image
    assert frame.groupby("index")["target"].apply(list).tolist() == [[0, 3], [1], [2, 3, 4]]
    pixel_values = small_processor()([example["image"] for example in examples], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values, pooling="ca").logits.sigmoid()
    for row in frame.itertuples():
        assert row.probability == pytest.approx(expected[row.index, row.target].item(), abs=1e-5)
    by_image = frame.groupby("index")["average_drop"].mean()
    assert report.results["rows"][0]["metrics"]["average_drop"]["mean"] == pytest.approx(by_image.mean())
    assert report.results["sample"] | {"skipped": []} == {
        "images": 3,
        "maps_explained": 6,
        "images_without_label": 0,
        "skipped": [],
    }


@pytest.mark.parametrize("pooling", ["gap", "ca"])
def test_a_single_logit_is_explained_for_both_of_its_labels(pooling):
    model, examples = small_model(num_labels=1), small_examples(6, num_labels=2)
    images = [example["image"] for example in examples]
    with torch.no_grad():
        inputs = small_processor()(images, return_tensors="pt").pixel_values
        logits = model(inputs, pooling=pooling).logits[:, 0]
        model.classifier.bias -= logits.sort().values[2:4].mean()  # so that both labels are predicted
        logits = model(inputs, pooling=pooling).logits[:, 0]
    metrics = ("average_drop", "positive_perturbation")
    report = evaluate(examples, model, methods=("grad_cam",), poolings=(pooling,), metrics=metrics)
    frame = report.per_image
    assert frame["target"].tolist() == [0] * 6
    np.testing.assert_allclose(frame["probability"], logits.sigmoid(), atol=1e-5)
    assert frame["predicted"].tolist() == (logits > 0).long().tolist() and frame["predicted"].nunique() == 2
    labels = np.array([example["label"] for example in examples])
    assert report.results["accuracy"][pooling]["mean"] == pytest.approx(100 * ((logits > 0).numpy() == labels).mean())
    drop = 100 * (1 - frame["probability_masked"] / frame["probability"]).clip(lower=0)
    np.testing.assert_allclose(frame["average_drop"], drop, atol=1e-5)
    # an answer of 0 can be kept, too, though the explained logit is the other answer's
    assert frame["positive_perturbation"][(labels == 0) & (frame["predicted"] == 0)].max() > 0
    with pytest.raises(ValueError, match="has the class id 2: the model's are 0 to 1"):
        evaluate([examples[0] | {"label": 2}], model)


def test_temperature_of_a_single_logit():
    report = evaluate(small_examples(4, num_labels=2), small_model(num_labels=1), controls=("temperature",))
    frame = report.per_image.query("method == 'grad_cam'")
    by_control = {
        key: np.maximum(group["probability"], 1 - group["probability"]).mean()
        for key, group in frame.groupby(["pooling", "control"])
    }
    assert by_control["gap", "temperature"] == pytest.approx(by_control["ca", ""], abs=1e-4)


def test_a_regression_is_refused():
    with pytest.raises(ValueError, match=r"the model is a regression \(problem_type\)"):
        evaluate(small_examples(2), small_model(num_labels=1, problem_type="regression"))


def test_without_labels_the_predicted_class_is_explained_and_the_report_says_so():
    model, examples = small_model(), small_examples(4)
    for example in examples:
        example["label"] = None
    report = evaluate(examples, model, methods=("grad_cam",), metrics=("average_drop",))
    pixel_values = small_processor()([example["image"] for example in examples], return_tensors="pt").pixel_values
    with torch.no_grad():
        predicted = model(pixel_values, pooling="gap").logits.argmax(-1).tolist()
    for pooling in ("gap", "ca"):  # the same class under both, or they could not be compared
        frame = report.per_image
        assert frame[frame["pooling"] == pooling]["target"].tolist() == predicted
    assert report.results["accuracy"] == {"gap": None, "ca": None, "ca_minus_gap": None}
    assert "4 images have no label: the predicted class is explained." in report.markdown()
    assert "Accuracy: unknown" in report.markdown()


def test_target_predicted_ignores_labels():
    model, examples = small_model(), small_examples(5)
    labelled = evaluate(examples, model, methods=("grad_cam",), metrics=("average_drop",), target="predicted").per_image
    for example in examples:
        example["label"] = None
    unlabelled = evaluate(examples, model, methods=("grad_cam",), metrics=("average_drop",)).per_image
    assert labelled["target"].tolist() == unlabelled["target"].tolist()
    assert labelled["correct"].notna().all() and unlabelled["correct"].isna().all()


def test_a_uniform_map_drops_gains_and_increases_nothing():
    report = evaluate(small_examples(4), methods=("grad_cam",), controls=("uniform_map",))
    rows = report.per_image.query("method == 'uniform_map'")
    assert (rows[["average_drop", "average_gain", "average_increase"]] == 0).all(axis=None)
    assert (rows["map_area"] == 1).all()


def test_map_only_scores_the_maps_of_ca_by_the_gap_network():
    controls = ("map_only", "norm")
    report = evaluate(small_examples(4), methods=("grad_cam",), metrics=("average_drop",), controls=controls)
    frame = report.per_image
    gap, ca, map_only = (
        frame.query("pooling == @pooling and control == @control").reset_index()
        for pooling, control in (("gap", ""), ("ca", ""), ("ca", "map_only"))
    )
    np.testing.assert_array_equal(map_only["probability"], gap["probability"])
    np.testing.assert_array_equal(map_only["map_area"], ca["map_area"])
    assert (map_only["probability_masked"] - ca["probability_masked"]).abs().min() > 0


def test_pooling_only_scores_the_maps_of_gap_by_ca_at_gaps_norm():
    controls = ("pooling_only", "norm")
    report = evaluate(small_examples(4), methods=("grad_cam",), metrics=("average_drop",), controls=controls)
    gap, norm, pooling_only = (
        report.per_image.query("pooling == @pooling and control == @control").reset_index()
        for pooling, control in (("gap", ""), ("ca", "norm"), ("ca", "pooling_only"))
    )
    np.testing.assert_array_equal(pooling_only["map_area"], gap["map_area"])
    np.testing.assert_array_equal(pooling_only["probability"], norm["probability"])
    assert (pooling_only["probability_masked"] - norm["probability_masked"]).abs().min() > 0
    [pair] = [pair for pair in report.results["ca_minus_gap"] if pair["control"] == "pooling_only"]
    expected = (pooling_only["average_drop"] - gap["average_drop"]).mean()
    assert pair["metrics"]["average_drop"]["mean"] == pytest.approx(expected)


def test_model_is_left_as_it_was():
    model = small_model()
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(small_examples(3), model, controls=("randomization", "norm"), metrics=("average_drop",))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_autocast_runs_and_stays_close():
    exact, fast = (
        evaluate(small_examples(4), metrics=("average_drop",), autocast=autocast).per_image["probability"]
        for autocast in ("off", "bf16")
    )
    assert 0 < np.abs(exact - fast).max() < 0.05


def test_images_with_an_empty_map_are_counted():
    """An untrained stream attends uniformly: its raw attention is flat, defined as zero."""
    report = evaluate(
        small_examples(3), small_model(trained=False), methods=("raw_attention",), metrics=("average_drop",)
    )
    assert [row["images_with_empty_maps"] for row in report.results["rows"]] == [3, 3]


def test_saliency_of_the_wrong_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"saliency of grad_cam has the shape \(4, 1, 7, 7\): give \(4, height, width\)"
    ):
        check_saliency(torch.zeros(4, 1, 7, 7), 4, "grad_cam")
    with pytest.raises(ValueError, match=r"saliency of grad_cam has the shape \(3, 7, 7\)"):
        check_saliency(torch.zeros(3, 7, 7), 4, "grad_cam")
    with pytest.raises(ValueError, match="NaN or values outside"):
        check_saliency(torch.full((4, 7, 7), torch.nan), 4, "grad_cam")


def test_nan_logits_are_refused():
    model = small_model()
    model.classifier.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="images image-0 to image-2: logits under gap are NaN or infinite"):
        evaluate(small_examples(3), model)


@pytest.mark.parametrize("label", [5, -2])
def test_class_ids_out_of_range_are_refused(label):
    examples = small_examples(3)
    examples[1]["label"] = label
    with pytest.raises(ValueError, match=f"image 'image-1' has the class id {label}: the model's are 0 to 4"):
        evaluate(examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("grad_cam", "gradcam")}, "methods must be different names out of .*got grad_cam, gradcam"),
        ({"methods": ()}, "methods is empty"),
        ({"metrics": ("AD",)}, "metrics must be"),
        ({"poolings": ("gap", "gap")}, "poolings must be different"),
        ({"protocol": "paper"}, "protocol must be one of reference, stable, .*, got 'paper'"),
        ({"target": "gt"}, "target must be one of"),
        ({"autocast": "half"}, "autocast must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"poolings": ("ca",), "controls": ("map_only",)}, "controls map_only compare both poolings"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


def test_the_second_class_is_explained_by_its_own_map():
    model = small_model(evidence_queries=["memory"])
    examples = [example | {"label": None} for example in small_examples(3)]
    settings = EvaluationSettings(
        methods=("evidence", "grad_cam"), poolings=("gap",), metrics=("average_drop",), target="second", num_examples=3
    )
    report = evaluate_saliency(model, small_processor(), examples, settings)
    assert "have no label: the second class is explained." in report.markdown()
    for index, example in enumerate(examples):
        pixel_values = small_processor()(example["image"], return_tensors="pt").pixel_values
        with torch.no_grad():
            second = model(pixel_values, pooling="gap").logits.sort(descending=True).indices[0, 1].item()
        assert report.per_image.query("index == @index")["target"].unique().tolist() == [second]
        for method in settings.methods:
            expected = explain(model, pixel_values, [second], method, "gap", upsample=False)[0]
            np.testing.assert_allclose(report.examples[index][f"{method}|gap"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="target='second' needs a second class"):
        evaluate_saliency(small_model(num_labels=1), small_processor(), examples, settings)


@pytest.mark.parametrize(("kind", "given"), [("predicted", False), ("label", True)])
def test_evidence_is_the_forward_passs_for_the_prediction_and_a_classs_for_a_label(kind, given):
    """The map that the model returns is what an evaluation of its predictions measures."""
    model, examples = small_model(evidence_queries=["memory"]), small_examples(3)
    settings = EvaluationSettings(
        methods=("evidence",), poolings=("gap",), metrics=("average_drop",), target=kind, num_examples=3
    )
    report = evaluate_saliency(model, small_processor(), examples, settings)
    for index, example in enumerate(examples):
        pixel_values = small_processor()(example["image"], return_tensors="pt").pixel_values
        target = [example["label"]] if given else None
        expected = explain(model, pixel_values, target, "evidence", "gap", upsample=False)[0]
        np.testing.assert_allclose(report.examples[index]["evidence|gap"], expected.cpu(), atol=1e-5)
        other = explain(model, pixel_values, None if given else 0, "evidence", "gap", upsample=False)[0]
        assert not np.allclose(report.examples[index]["evidence|gap"], other.cpu(), atol=1e-3)
