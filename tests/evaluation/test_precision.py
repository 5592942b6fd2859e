"""The faster precision is found, stays with a run, and the report says how its figures go with float32's."""

import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation import precision as choice
from castream.evaluation.precision import correlations, faster_dtype

from tests.evaluation.small import small_examples, small_model, small_processor

METRICS = ("average_drop", "insertion")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(choice, "_faster", {})


def clock(monkeypatch, half: float) -> list:
    """Let a bf16 pass take `half` of float32's time; returns the dtypes of the passes to come."""
    passes = []

    def seconds(model, pixel_values, dtype):
        passes.append(dtype)
        return half if dtype else 1.0

    monkeypatch.setattr(choice, "_seconds", seconds)
    return passes


def evaluate(folder=None, **settings):
    settings = EvaluationSettings(methods=("grad_cam",), metrics=METRICS, batch_size=4, **settings)
    return evaluate_saliency(small_model(), small_processor(), small_examples(6), settings, folder)


@pytest.mark.parametrize(("half", "expected"), [(0.5, torch.bfloat16), (0.95, None), (1.5, None)])
def test_bf16_is_taken_where_it_saves_a_tenth_and_timed_once(monkeypatch, half, expected):
    passes = clock(monkeypatch, half)
    model, pixel_values = small_model(), torch.zeros(1, 3, 64, 64)
    assert [faster_dtype(model, pixel_values) for _ in range(2)] == [expected, expected]
    assert passes == [None, torch.bfloat16] * 4
    assert faster_dtype(small_model().to(torch.bfloat16), pixel_values) is None


def test_passes_are_timed():
    assert choice._seconds(small_model(), torch.zeros(1, 3, 64, 64), torch.bfloat16) > 0


def test_auto_is_what_was_found_and_stays_with_the_run(monkeypatch, tmp_path):
    clock(monkeypatch, 0.5)
    report = evaluate(tmp_path, autocast="auto")
    precision = report.results["precision"]
    assert precision["autocast"] == "bf16" and precision["images"] == 4
    assert all(0.99 < precision["correlation"][name] <= 1 for name in METRICS)
    assert "ran in bf16; correlation with float32 over the first 4 images: average_drop " in report.markdown()
    expected = evaluate(autocast="bf16").per_image
    assert report.per_image["average_drop"].tolist() == expected["average_drop"].tolist()
    monkeypatch.setattr(choice, "_faster", dict.fromkeys(choice._faster))
    assert evaluate(tmp_path, autocast="auto").results["precision"] == precision
    slow = evaluate(autocast="auto")
    assert slow.results["precision"] == {"autocast": "off"} and "float32" not in slow.markdown()


def test_correlations():
    rows = [{"kept": value, "sparsity": 1.0, "average_drop": None} for value in (1, 2, 3, 4)]
    exact = [{"kept": value, "sparsity": 1.0, "average_drop": None} for value in (2, 1, 4, 3)]
    found = correlations(rows, exact, ("kept", "sparsity", "average_drop"))
    assert found == {"kept": pytest.approx(0.6), "sparsity": None, "average_drop": None}
