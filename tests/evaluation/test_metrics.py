"""The metrics: hand-computed values, the research code's figures, bad input, and loading by path, offline."""

import doctest
import os
import re
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
METRICS_FOLDER = ROOT / "evaluation" / "metrics"
REFERENCE = np.load(ROOT / "tests" / "reference" / "metrics_public.npz")
MODELS, MAPS = ("stream", "gap"), ("gradcam", "gradcampp", "scorecam", "synthetic")
NAMES = [
    "average_drop",
    "average_gain",
    "average_increase",
    "deletion",
    "insertion",
    "kept",
    "mask_share",
    "negative_perturbation",
    "pixel_average_precision",
    "pointing_game",
    "positive_perturbation",
    "sparsity",
]
PAIRED = ["average_drop", "average_gain", "average_increase"]
CURVES = ["insertion", "deletion"]
PERTURBATIONS = ["positive_perturbation", "negative_perturbation"]
# one valid item of each metric's input
ONE_ITEM = {
    **{name: {"predictions": [0.5], "references": [0.5]} for name in PAIRED},
    **{name: {"predictions": [[0.5, 0.25]]} for name in CURVES},
    **{name: {"predictions": [[1, 2]], "references": [1]} for name in PERTURBATIONS},
    "pointing_game": {"predictions": [1]},
    "mask_share": {"predictions": [0.5]},
    "pixel_average_precision": {"predictions": [0.5]},
    "kept": {"predictions": [2], "references": [2]},
    "sparsity": {"predictions": [2.0]},
}


@pytest.fixture(scope="module", autouse=True)
def evaluate_cache(tmp_path_factory):
    """Keep `evaluate`'s caches out of the home folder."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("evaluate")
    patch.setattr("evaluate.config.HF_METRICS_CACHE", str(cache / "metrics"))
    yield
    patch.undo()


def load_metric(name: str) -> evaluate.Metric:
    """As the cards say: by path, numbers in memory, so that runs that share a cache cannot meet in one file."""
    return evaluate.load(str(METRICS_FOLDER / name), keep_in_memory=True, experiment_id=uuid.uuid4().hex)


def compute(name, average=True, **inputs):
    result = load_metric(name).compute(**inputs, average=average)
    assert list(result) == [name]
    return result[name]


def label_probability(key):
    return REFERENCE[key][np.arange(4), REFERENCE["labels"]]


def test_every_metric_is_there():
    assert sorted(folder.name for folder in METRICS_FOLDER.iterdir() if folder.name != "__pycache__") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_in_the_wheel(name):
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert f"castream.evaluation.metrics.{name}" in packages


@pytest.mark.parametrize(
    ("name", "inputs", "per_image"),
    [
        # o = .2 of p = .8: 75 % lost; .9 of .6: nothing; 0 of .5: everything
        ("average_drop", {"predictions": [0.2, 0.9, 0.0], "references": [0.8, 0.6, 0.5]}, [75, 0, 100]),
        # .9 from .6: .3 of the missing .4; 1 from .5: all of it
        ("average_gain", {"predictions": [0.2, 0.9, 1.0], "references": [0.8, 0.6, 0.5]}, [0, 75, 100]),
        # equal is no increase
        ("average_increase", {"predictions": [0.2, 0.9, 0.5], "references": [0.8, 0.6, 0.5]}, [0, 100, 0]),
        # (0/2 + .5 + 1/2) / 2 = .5; one step: (.2 + .4) / 2 = .3
        ("insertion", {"predictions": [[0.0, 0.5, 1.0], [0.2, 0.4]]}, [50, 30]),
        # (1/2 + .25 + .25 + 0/2) / 3
        ("deletion", {"predictions": [[1.0, 0.25, 0.25, 0.0]]}, [100 / 3]),
        ("positive_perturbation", {"predictions": [[3, 3, 1, 0], [5, 2, 5, 5]], "references": [3, 2]}, [50, 25]),
        ("negative_perturbation", {"predictions": [[3, 3, 3, 3], [5, 2, 5, 2]], "references": [3, 2]}, [100, 50]),
        ("pointing_game", {"predictions": [True, False, 1.0]}, [100, 0, 100]),
        ("mask_share", {"predictions": [0.0, 0.25, 1.0]}, [0, 25, 100]),
        ("pixel_average_precision", {"predictions": [0.0, 0.25, 1.0]}, [0, 25, 100]),
        ("kept", {"predictions": [3, 0, 7], "references": [3, 3, 7]}, [100, 0, 100]),
        ("sparsity", {"predictions": [1.0, 4.0]}, [1, 4]),
    ],
)
def test_hand_computed(name, inputs, per_image):
    np.testing.assert_allclose(compute(name, average=False, **inputs), per_image, atol=1e-12)
    assert compute(name, **inputs) == pytest.approx(np.mean(per_image), abs=1e-12)


def test_limits_of_the_divisions():
    """p = 0 has nothing to lose and p = 1 nothing to gain: 0, not 0 / 0."""
    zero_and_one = {"predictions": [0.0, 0.3, 1.0, 0.3], "references": [0.0, 0.0, 1.0, 1.0]}
    np.testing.assert_allclose(compute("average_drop", average=False, **zero_and_one), [0, 0, 0, 70])
    np.testing.assert_allclose(compute("average_gain", average=False, **zero_and_one), [0, 30, 0, 0])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("map_name", MAPS)
def test_reference_drop_gain_increase(model, map_name):
    key = f"{model}.{map_name}"
    inputs = {
        "predictions": label_probability(f"{key}.probs_masked"),
        "references": label_probability(f"{model}.probs"),
    }
    for name, short in zip(PAIRED, ("ad", "ag", "ai"), strict=True):
        expected = REFERENCE[f"{key}.{short}"]
        np.testing.assert_allclose(compute(name, average=False, **inputs), expected, atol=1e-3, err_msg=name)
        assert compute(name, **inputs) == pytest.approx(expected.mean(), abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("name", CURVES)
def test_reference_insertion_deletion(model, map_name, name):
    curves, expected = (REFERENCE[f"{model}.{map_name}.{name}.{part}"] for part in ("curve", "auc"))
    np.testing.assert_allclose(compute(name, average=False, predictions=curves), 100 * expected, atol=1e-4)


@pytest.mark.parametrize(("model", "positive", "negative"), [("stream", 0.1944444477558136, 0.25), ("gap", 0.0, 0.0)])
def test_reference_perturbation(model, positive, negative):
    """The score against the labels; both expected figures are the research code's, as shares."""
    for name, expected in (("positive", positive), ("negative", negative)):
        classes = REFERENCE[f"{model}.synthetic.perturbation.{name}.logits"].argmax(-1)
        score = compute(f"{name}_perturbation", predictions=classes, references=REFERENCE["labels"])
        assert score == pytest.approx(100 * expected, abs=1e-4)


def test_reference_perturbation_of_the_prediction():
    """The score against the class predicted on the whole image, where it is not trivially low."""
    for model, positive, negative in (("stream", 0.5555555820465088, 0.4166666567325592), ("gap", 13 / 36, 11 / 36)):
        predicted = REFERENCE[f"{model}.logits"].argmax(-1)
        for name, expected in (("positive", positive), ("negative", negative)):
            classes = REFERENCE[f"{model}.synthetic.perturbation.{name}.logits"].argmax(-1)
            score = compute(f"{name}_perturbation", predictions=classes, references=predicted)
            assert score == pytest.approx(100 * expected, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_batches_tensors_and_lists_agree(name):
    inputs = {key: value * 3 for key, value in ONE_ITEM[name].items()}
    expected = compute(name, **inputs)
    assert compute(name, **{key: np.array(value) for key, value in inputs.items()}) == expected
    assert compute(name, **{key: torch.tensor(value) for key, value in inputs.items()}) == expected
    metric = load_metric(name)
    for _ in range(3):
        metric.add_batch(**ONE_ITEM[name])
    assert metric.compute()[name] == expected


@pytest.mark.parametrize("name", PAIRED)
def test_probabilities_may_leave_the_range_by_rounding_only(name):
    assert np.isfinite(compute(name, predictions=[1 + 1e-7], references=[-1e-7]))
    with pytest.raises(ValueError, match=r"^predictions holds 1.01, outside \[0, 1\]: give probabilities.*$"):
        compute(name, predictions=[1.01], references=[0.5])
    with pytest.raises(ValueError, match=r"^references holds 50, outside \[0, 1\]"):
        compute(name, predictions=[0.5], references=[50])


@pytest.mark.parametrize("name", NAMES)
def test_empty_input_is_refused(name):
    with pytest.raises(ValueError, match=r"^predictions .*(empty|at least one)"):
        load_metric(name).compute(**{key: [] for key in ONE_ITEM[name]})


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name):
    inputs = {key: value * 2 for key, value in ONE_ITEM[name].items()}
    last = inputs["predictions"][-1]
    inputs["predictions"] = [inputs["predictions"][0], [last[0], np.nan] if isinstance(last, list) else np.nan]
    with pytest.raises(ValueError, match=r"(?i)^predictions.* holds .*nan") as error:
        compute(name, **inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*PAIRED, *PERTURBATIONS, "kept"])
def test_unequal_lengths_are_refused(name):
    inputs = {**ONE_ITEM[name], "references": [1, 1]}
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        compute(name, **inputs)
    with pytest.raises(ValueError, match=r"^predictions has 1 .*references.* 2"):
        pure_function(name)(inputs["predictions"], inputs["references"])


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("insertion", {"predictions": [[0.5, 0.5], [0.5]]}, r"^predictions\[1\] has shape \(1,\)"),
        ("deletion", {"predictions": [[0.5, 7.0]]}, r"^predictions\[0\] holds 7, outside \[0, 1\]"),
        ("positive_perturbation", {"predictions": [[1, 2], [1]], "references": [1, 1]}, "rows of unequal length"),
        ("negative_perturbation", {"predictions": [[0.7, 0.1]], "references": [1]}, r"^predictions holds 0.7"),
        ("negative_perturbation", {"predictions": [[1, 1]], "references": [-1]}, r"^references holds -1"),
        ("pointing_game", {"predictions": [0.5]}, r"^predictions holds 0.5: give 1 for a hit"),
        ("mask_share", {"predictions": [50.0]}, r"^predictions holds 50, outside \[0, 1\]"),
        ("pixel_average_precision", {"predictions": [50.0]}, r"^predictions holds 50, outside \[0, 1\]"),
        ("kept", {"predictions": [0.7], "references": [1]}, r"^predictions holds 0.7: give class ids"),
        ("kept", {"predictions": [1], "references": [-1]}, r"^references holds -1: give class ids"),
        ("sparsity", {"predictions": [0.5]}, r"^predictions holds 0.5"),
        ("sparsity", {"predictions": [np.inf]}, r"^predictions holds inf"),
    ],
)
def test_bad_values_are_refused_in_one_line(name, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        compute(name, **inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_survives_bad_input_and_leaves_its_input_alone(name):
    metric, inputs = load_metric(name), ONE_ITEM[name]
    before = repr(inputs)
    first = metric.compute(**inputs)
    with pytest.raises(ValueError, match="predictions"):
        metric.compute(**{**inputs, "predictions": [[-5.0, np.nan]] if name in CURVES + PERTURBATIONS else [-5.0]})
    assert metric.compute(**inputs) == first
    assert repr(inputs) == before


def test_two_instances_at_once_do_not_meet():
    first, second = load_metric("average_drop"), load_metric("average_drop")
    first.add_batch(predictions=[0.0], references=[1.0])
    second.add_batch(predictions=[1.0], references=[1.0])
    assert (first.compute(), second.compute()) == ({"average_drop": 100.0}, {"average_drop": 0.0})


def test_combine():
    combined = evaluate.combine([str(METRICS_FOLDER / name) for name in PAIRED])
    result = combined.compute(predictions=[0.4, 0.9], references=[0.8, 0.6])
    assert result == pytest.approx({"average_drop": 25.0, "average_gain": 37.5, "average_increase": 50.0})
    result = combined.compute(predictions=[0.4, 0.9], references=[0.8, 0.6], average=False)
    assert result["average_increase"] == [0.0, 100.0]


def pure_function(name):
    """The function beside the metric class, out of the module that `evaluate` loaded."""
    return getattr(sys.modules[type(load_metric(name)).__module__], name)


@pytest.mark.parametrize("name", NAMES)
def test_card_and_docstring_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = METRICS_FOLDER / name
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for text in ((folder / "README.md").read_text("utf-8"), load_metric(name).inputs_description):
        examples = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, name, None, 0)
        assert len(examples.examples) >= 2
        assert runner.run(examples).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_folder_can_be_pushed_as_it_is(name):
    """Each folder stands alone: no import from the project, a card with front matter, its requirements."""
    folder = METRICS_FOLDER / name
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {f"{name}.py", "README.md", "requirements.txt"}
    imports = re.findall(r"^(?:from|import) (\w+)", (folder / f"{name}.py").read_text("utf-8"), re.MULTILINE)
    assert sorted(imports) == ["datasets", "evaluate", "numpy"]
    requirements = (folder / "requirements.txt").read_text("utf-8").split()
    assert sorted(re.match(r"\w+", line)[0] for line in requirements) == sorted(imports)
    assert (folder / "README.md").read_text("utf-8").startswith("---\ntitle: ")


def test_loads_by_path_offline_in_a_fresh_process(tmp_path):
    """From another working directory, with an empty cache, and with every network connection failing."""
    script = f"""
import socket
def refuse(*args):
    raise SystemExit("a metric asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
for name in {NAMES}:
    metric = evaluate.load({str(METRICS_FOLDER)!r} + "/" + name)
    print(name, metric.compute(**{ONE_ITEM}[name])[name])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    printed = dict(line.split() for line in run.stdout.splitlines())
    assert {name: float(value) for name, value in printed.items()} == {
        name: compute(name, **ONE_ITEM[name]) for name in NAMES
    }
