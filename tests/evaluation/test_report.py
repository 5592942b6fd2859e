import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.figures import (
    BASELINE_TITLES,
    ExampleRow,
    _legend,
    _without_twins,
    example_columns,
    mean_curves,
    write_curves,
    write_examples,
    write_report_examples,
)
from castream.evaluation.markdown import to_markdown
from castream.evaluation.published import published_rows
from castream.evaluation.store import SCHEMA, Part
from castream.evaluation.summary import summarize
from PIL import Image
from transformers import ConvNextConfig, ResNetConfig, TimmBackboneConfig

from modeling_castream import CAStreamConfig, explain
from modeling_castream.methods_castream import METHODS
from tests.evaluation.small import mean_interval, small_examples, small_image, small_model, small_processor

SETTINGS = EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",))


def row(index, pooling, average_drop, target=0, correct=True, **values):
    fixed = {"index": index, "id": str(index), "target": target, "predicted": 0, "correct": correct, "control": ""}
    numbers = {"probability": 0.5, "map_area": 0.25, "empty_map": False}
    return fixed | numbers | {"method": "grad_cam", "pooling": pooling, "average_drop": average_drop} | values


def summary(rows, settings=SETTINGS, skipped=()):
    part = Part(pa.Table.from_pylist(rows, schema=SCHEMA), [0], list(skipped))
    return summarize(settings, part, {"model": "m", "dataset": "d", "temperature": None})


def test_means_by_hand():
    """Two images, the first with two labels: an image is one unit, whatever the number of its labels."""
    rows = [row(0, "gap", 10.0), row(0, "gap", 30.0, target=1), row(1, "gap", 40.0, correct=False)]
    rows += [row(0, "ca", 10.0), row(0, "ca", 20.0, target=1), row(1, "ca", 30.0)]
    results = summary(rows)
    gap, ca = (entry["metrics"]["average_drop"] for entry in results["rows"])
    assert (gap["mean"], gap["images"]) == (30, 2)
    assert ca["mean"] == 22.5
    assert (gap["low"], gap["high"]) == (20, 40)
    (pair,) = results["ca_minus_gap"]
    assert pair["metrics"]["average_drop"] == {"mean": -7.5, "low": -10, "high": -5, "images": 2}
    assert results["accuracy"]["gap"]["mean"] == 50
    assert results["accuracy"]["ca_minus_gap"]["mean"] == 50
    assert results["rows"][0]["metrics"]["map_area"]["mean"] == 25
    assert results["sample"]["maps_explained"] == 3


def test_values_that_are_missing_are_left_out_and_counted():
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("mask_share",), poolings=("gap",))
    rows = [row(index, "gap", None, mask_share=share) for index, share in enumerate((40.0, None, 60.0))]
    share = summary(rows, settings)["rows"][0]["metrics"]["mask_share"]
    assert (share["mean"], share["images"]) == (50, 2)
    nothing = summary([row(0, "gap", None)], settings)["rows"][0]["metrics"]["mask_share"]
    assert nothing is None


def test_intervals_are_the_same_however_many_are_computed_at_once(monkeypatch):
    """One image lacks a value, so figures of three and of two images wait side by side."""
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("mask_share", "average_drop"))
    numbers = np.random.default_rng(0).random((3, 2))
    rows = [
        row(index, pooling, 100 * numbers[index, place], mask_share=None if index == 1 else 50 * numbers[index, place])
        for place, pooling in enumerate(("gap", "ca"))
        for index in range(3)
    ]
    together = summary(rows, settings)
    monkeypatch.setattr("castream.evaluation.summary.MAX_HELD", 0)
    alone = summary(rows, settings)
    for one, other in zip(
        alone["rows"] + alone["ca_minus_gap"], together["rows"] + together["ca_minus_gap"], strict=True
    ):
        assert all(one["metrics"][name] == pytest.approx(entry) for name, entry in other["metrics"].items())
    shares = [row["metrics"]["mask_share"] for row in together["rows"]]
    drops = [row["metrics"]["average_drop"] for row in together["rows"]]
    for place in range(2):
        expected = mean_interval(50 * numbers[[0, 2], place])
        assert shares[place] == pytest.approx(expected._asdict() | {"images": 2})
        assert drops[place] == pytest.approx(mean_interval(100 * numbers[:, place])._asdict() | {"images": 3})
    (pair,) = together["ca_minus_gap"]
    expected = mean_interval(50 * (numbers[[0, 2], 1] - numbers[[0, 2], 0]))
    assert pair["metrics"]["mask_share"] == pytest.approx(expected._asdict() | {"images": 2})


def test_markdown_rounds_and_names_the_sample():
    text = to_markdown(summary([row(0, "gap", 12.345), row(0, "ca", 12.344)], skipped=[{"index": 1, "id": "bad"}]))
    assert "| grad_cam | GAP | 12.35 [one image] | 25.00 [one image] |" in text
    assert "| grad_cam | 0.00 [one image] |" in text  # not -0.00
    assert "1 image could not be decoded and was skipped: bad." in text


def published(backbone, dataset="imagenet-1k (validation)", num_labels=1000):
    return published_rows(CAStreamConfig(backbone_config=backbone, num_labels=num_labels), dataset)


def test_papers_row_appears_where_network_and_dataset_match():
    large = ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3])
    assert published(ResNetConfig())[0] == published(TimmBackboneConfig(backbone="resnet50.a1_in1k"))[0] == "ResNet-50"
    assert published(large)[0] == "ConvNeXt-B"
    assert published(ResNetConfig(depths=[2, 2, 2, 2])) is None
    assert published(ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3])) is None
    assert published(ResNetConfig(), "imagenet-1k (train)") is None
    assert published(ResNetConfig(), "cifar10 (validation)") is None
    assert published(ResNetConfig(), num_labels=10) is None
    for name in ("ILSVRC/imagenet-1k", "timm/imagenet-1k-wds", "data/imagenet/*", "ImageNet2012", "imagenet"):
        assert published(ResNetConfig(), f"{name} (validation)"), name
    for name in ("imagenet-v2", "imagenet-sketch", "tiny-imagenet", "imagenette", "imagenet-a", "my-imagenet-1k-not"):
        assert published(ResNetConfig(), f"{name} (validation)") is None, name
    results = summary([row(0, "gap", 13.0), row(0, "ca", 12.0)])
    text = to_markdown(results, published(ResNetConfig()))
    assert "| grad_cam | GAP | 100.00 / 74.55 | 13.00 / 13.04 |" in text
    assert "| grad_cam | CA | 100.00 / 74.70 | 12.00 / 12.54 |" in text
    assert "score_cam" not in text


@pytest.fixture(scope="module")
def report():
    settings = EvaluationSettings(
        methods=("raw_attention", "grad_cam"), metrics=("average_drop", "insertion", "deletion"), num_examples=3
    )
    return evaluate_saliency(small_model(), small_processor(), small_examples(6), settings)


def test_markdown_lists_what_was_skipped_and_how_classes_were_matched():
    many = [{"index": 9 + index, "id": f"bad{index}"} for index in range(25)]
    results = summary([row(0, "gap", 1.0, correct=None), row(0, "ca", 1.0, correct=None)], skipped=many)
    text = to_markdown(results | {"note": "Taken by their numbers."})
    assert "1 image has no label: the predicted class is explained. Taken by their numbers." in text
    assert "25 images could not be decoded and were skipped: bad0, " in text
    assert "bad19, and those in results.json." in text and "bad20" not in text


def test_everything_is_written(report, tmp_path):
    report.write(tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"results.json", "results.md", "per_image.parquet", "examples.png", "curves.png"}
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert results == json.loads(json.dumps(report.results))
    assert results["settings"]["protocol"] == "reference"
    assert {"torch", "transformers", "python"} <= set(results["versions"])
    table = pd.read_parquet(tmp_path / "new" / "folder" / "per_image.parquet")
    assert len(table) == len(report.per_image) == 6 * 4
    for name, rows in (("examples.png", 3), ("curves.png", 0)):
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert picture.size[1] > 150 * max(rows, 1)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_examples_are_spread_over_the_dataset(report):
    assert sorted(report.examples) == [0, 2, 4]
    arrays = report.examples[2]
    assert arrays["image"].shape == (64, 64, 3) and arrays["mask"].dtype == bool
    assert str(arrays["title"]).startswith("LABEL_2\nGAP ")


def test_columns_of_the_examples_can_be_chosen(report, tmp_path):
    write_report_examples(tmp_path / "all.png", report)
    write_report_examples(tmp_path / "two.png", report, [("raw_attention", "ca"), ("grad_cam", "gap")])
    with Image.open(tmp_path / "all.png") as full, Image.open(tmp_path / "two.png") as two:
        assert full.size[1] == two.size[1] and full.size[0] > two.size[0]


def test_raw_attention_is_in_the_picture_without_being_evaluated(tmp_path):
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",), num_examples=1)
    report = evaluate_saliency(small_model(), small_processor(), small_examples(2), settings)
    assert set(report.per_image["method"]) == {"grad_cam"}
    saliency = report.examples[0]["raw_attention|ca"]
    pixel_values = small_processor()(small_examples(1)[0]["image"], return_tensors="pt").pixel_values
    model = small_model().to(report.results["device"])
    expected = explain(model, pixel_values, method="raw_attention", pooling="ca", upsample=False)[0]
    np.testing.assert_allclose(saliency, expected.cpu(), atol=1e-6)
    assert [title for title, _, _ in example_columns(("grad_cam",), ("gap", "ca"))] == [
        "attention\n(CA)",
        "Grad-CAM\n(GAP)",
        "Grad-CAM\n(CA)",
    ]
    assert [title for title, _, _ in example_columns(("grad_cam",), ("gap",))] == ["Grad-CAM\n(GAP)"]
    write_report_examples(tmp_path / "x.png", report)


def test_curves_of_many_methods_look_different():
    methods = [*METHODS, *BASELINE_TITLES]
    looks = {(line.get_color(), line.get_marker()) for line in _legend(methods, ())}
    assert len(looks) == len(methods) == 17
    titles = [line.get_label() for line in _legend(["grad_cam"], ("gap", "ca"))]
    assert titles == ["Grad-CAM", "under GAP", "under CA"]


def test_no_curve_leaves_the_frame(report, tmp_path, monkeypatch):
    """The panels share an axis: the second one's curves may be the higher ones."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    table = report.part.table.to_pandas()
    table["deletion_curve"] = [np.clip(3 * curve + 0.2, 0, 1) for curve in table["deletion_curve"]]
    higher = replace(report, part=Part(pa.Table.from_pandas(table, schema=SCHEMA, preserve_index=False)))
    with pytest.raises(OSError, match="cannot write"):  # nothing was saved
        write_curves(tmp_path / "x.png", higher)
    for axis in figures[0].axes:
        bottom, top = axis.get_ylim()
        assert bottom == 0 and all(line.get_ydata().max() < top for line in axis.get_lines())


def test_examples_need_a_map_a_column(tmp_path):
    example = ExampleRow("a", np.asarray(small_image(0)), [np.zeros((7, 7))])
    with pytest.raises(ValueError, match="rows has 1 maps for 'a' but columns 2 titles"):
        write_examples(tmp_path / "x.png", [example], ["one", "two"])
    assert not list(tmp_path.iterdir())


def test_maps_are_drawn_where_they_are(tmp_path):
    """A map with one hot corner, on a black image: the brightest part of its panel is that corner."""
    saliency = np.zeros((4, 4))
    saliency[0, 3] = 1
    mask = np.zeros((64, 64), bool)
    mask[:16, 48:] = True
    image = np.zeros((64, 64, 3), np.uint8)
    write_examples(tmp_path / "x.png", [ExampleRow("a", image, [saliency])], ["map"])
    write_examples(tmp_path / "y.png", [ExampleRow("a", image, [0 * saliency], mask)], ["map"])
    for name, place in (("x.png", "map"), ("y.png", "outline")):
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        panel = pixels[70:250, 400:-20]  # within the second panel
        level = panel[..., 0] if place == "map" else panel[..., 2] - panel[..., 0]
        rows, columns = np.nonzero(level > 0.8 * level.max())
        assert rows.mean() < 60 and columns.mean() > panel.shape[1] / 2, place


def test_mean_curves_are_means_over_images(report):
    curves = {(method, pooling): curve for method, pooling, curve in mean_curves(report.part, "insertion")}
    frame = report.per_image.query("method == 'grad_cam' and pooling == 'ca'")
    np.testing.assert_allclose(curves["grad_cam", "ca"], np.mean(frame["insertion_curve"].tolist(), axis=0))
    assert len(curves) == 4


def test_mean_curves_of_images_of_several_sizes():
    """Curves of 3 and of 5 points: the short one is read halfway between its points."""
    rows = [
        {"index": 0, "method": "grad_cam", "pooling": "gap", "control": "", "insertion_curve": [0.0, 0.5, 1.0]},
        {
            "index": 1,
            "method": "grad_cam",
            "pooling": "gap",
            "control": "",
            "insertion_curve": [1.0, 1.0, 0.0, 0.0, 0.0],
        },
        {"index": 0, "method": "grad_cam", "pooling": "gap", "control": "map_only", "insertion_curve": [9.0, 9.0]},
    ]
    ((method, pooling, curve),) = mean_curves(Part(pa.Table.from_pylist(rows, schema=SCHEMA)), "insertion")
    assert (method, pooling) == ("grad_cam", "gap")
    np.testing.assert_allclose(curve, [0.5, 0.625, 0.25, 0.375, 0.5])


def test_a_map_that_poolings_share_has_one_column_in_the_picture():
    settings = EvaluationSettings(methods=("grad_cam", "eigen_cam"), metrics=("average_drop",), num_examples=2)
    report = evaluate_saliency(small_model(), small_processor(), small_examples(2), settings)
    columns = _without_twins(example_columns(settings.methods, settings.poolings), report.examples)
    assert [title for title, _, _ in columns] == ["attention\n(CA)", "Grad-CAM\n(GAP)", "Grad-CAM\n(CA)", "Eigen-CAM"]
