"""The precision of a run whose settings leave it open."""

import pytest
from castream.training import precision
from castream.training.arguments import TrainingArguments
from castream.training.run_folder import SETTINGS_FILE, recorded_settings

from tests.training.commands import start, torchrun


@pytest.fixture
def arguments(tmp_path, fresh_process_state):
    yield TrainingArguments(output_dir=str(tmp_path))
    fresh_process_state()


@pytest.fixture
def trial(monkeypatch):
    """A processor whose trials are counted, and which takes `share` of float32's time for bf16."""

    class Trial:
        share, runs = 0.5, 0

        def bfloat16_share(self, device):
            self.runs += 1
            return self.share

    found = Trial()
    monkeypatch.setattr("castream.artifacts.precision.bfloat16_share", found.bfloat16_share)
    monkeypatch.setattr(precision, "bfloat16_share", found.bfloat16_share)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return found


@pytest.mark.parametrize(("share", "expected"), [(0.5, "bf16"), (0.9, "bf16"), (0.95, "no"), (3.0, "no")])
def test_bf16_where_it_is_faster(arguments, trial, capsys, share, expected):
    trial.share = share
    assert precision.choose_precision(arguments).mixed_precision == expected
    said = capsys.readouterr()
    assert f"precision: {expected}; a convolution in bf16 takes {share:.2f} of its time" in said.out + said.err


def test_what_is_said_is_not_tried(arguments, trial, monkeypatch, tmp_path):
    for said in ("no", "bf16", "fp16"):
        arguments.mixed_precision = said
        assert precision.choose_precision(arguments).mixed_precision == said
    arguments.mixed_precision = "auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision.choose_precision(arguments).mixed_precision == "fp16"
    (tmp_path / SETTINGS_FILE).write_text("mixed_precision: 'no'")  # a run goes on as it began, on any machine
    assert precision.choose_precision(arguments).mixed_precision == "no"
    assert trial.runs == 0


def test_accelerates_default_is_nobodys_wish(arguments, trial, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision.choose_precision(arguments).mixed_precision == "bf16"


@pytest.mark.parametrize(("said", "expected"), [("1", True), ("true", True), ("0", False), (None, False)])
def test_the_processes_are_those_that_accelerate_makes(arguments, trial, monkeypatch, said, expected):
    """Made otherwise, they would be on the GPU after `accelerate launch --cpu`, or know nothing of one another."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if said is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    made, original = [], precision.PartialState
    monkeypatch.setattr(precision, "PartialState", lambda cpu: made.append(cpu) or original(cpu=cpu))
    precision.choose_precision(arguments)
    assert made == [expected]


@pytest.mark.slow
def test_two_processes_decide_alike(options):
    process = start(options | {"mixed_precision": "auto"}, *torchrun(29517), ACCELERATE_USE_CPU="1")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    recorded = recorded_settings(options["output_dir"])["mixed_precision"]
    assert said.count("precision: ") == 1 and f"precision: {recorded};" in said
