"""The faster precision is found, stays with a run, and the report says how its figures go with float32's."""

import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation import precision as choice
from castream.evaluation.precision import choose_autocast, correlations

from tests.evaluation.small import small_examples, small_model, small_processor

METRICS = ("average_drop", "insertion")


def processor(monkeypatch, prefers: bool) -> None:
    monkeypatch.setattr(choice, "prefers_bfloat16", lambda device: prefers)


def evaluate(folder=None, **settings):
    settings = EvaluationSettings(methods=("grad_cam",), metrics=METRICS, batch_size=6, **settings)
    return evaluate_saliency(small_model(), small_processor(), small_examples(6), settings, folder)


def test_a_model_of_another_dtype_is_left_in_it(monkeypatch):
    processor(monkeypatch, True)
    settings = EvaluationSettings(autocast="auto")
    assert choose_autocast(settings, small_model()) == "bf16"
    assert choose_autocast(settings, small_model().to(torch.bfloat16)) == "off"


def test_auto_is_what_was_found_and_stays_with_the_run(monkeypatch, tmp_path):
    processor(monkeypatch, True)
    report = evaluate(tmp_path, autocast="auto")
    precision = report.results["precision"]
    assert precision["autocast"] == "bf16" and precision["images"] == 4
    assert all(0.99 < precision["correlation"][name] <= 1 for name in METRICS)
    assert "ran in bf16; correlation with float32 over the first 4 images: average_drop " in report.markdown()
    expected = evaluate(autocast="bf16").per_image
    assert report.per_image["average_drop"].tolist() == expected["average_drop"].tolist()
    processor(monkeypatch, False)
    assert evaluate(tmp_path, autocast="auto").results["precision"] == precision
    slow = evaluate(autocast="auto")
    assert slow.results["precision"] == {"autocast": "off"} and "float32" not in slow.markdown()


def test_correlations():
    rows = [{"kept": value, "sparsity": 1.0, "average_drop": None} for value in (1, 2, 3, 4)]
    exact = [{"kept": value, "sparsity": 1.0, "average_drop": None} for value in (2, 1, 4, 3)]
    found = correlations(rows, exact, ("kept", "sparsity", "average_drop"))
    assert found == {"kept": pytest.approx(0.6), "sparsity": None, "average_drop": None}
