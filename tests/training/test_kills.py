"""kill -9 at ten random moments: nothing is lost but the steps since the last checkpoint."""

import contextlib
import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from castream.artifacts.files import PARTIAL
from castream.training.checkpoint import list_checkpoints, read_checkpoint
from safetensors.torch import load_file

from tests.training.commands import kill_all, start, torchrun
from tests.training.tiny_data import write_shards

CHECKPOINT_STEPS = 16
PATIENCE = 120  # seconds for a moment to come

# A moment of a run: what to wait for in its folder since the run began, and up to how many seconds to wait after that.
Moment = tuple[str, Callable[[Path, float], bool], float]


def appears(pattern: str) -> Callable[[Path, float], bool]:
    """Whether this run has made a path; what a killed one left is older."""

    def has_come(folder: Path, started: float) -> bool:
        with contextlib.suppress(FileNotFoundError):  # gone between being listed and being looked at
            return any(path.stat().st_ctime > started for path in folder.glob(pattern))
        return False

    return has_come


START_UP: Moment = ("start-up", lambda folder, started: True, 6.0)
CACHING: Moment = ("caching", appears("features/*.safetensors*"), 0.2)
TRAINING: Moment = ("training", appears("checkpoints/step-????????"), 0.5)
CHECKPOINT: Moment = ("checkpoint", appears(f"checkpoints/*{PARTIAL}/model.safetensors*"), 0.02)
SAVING: Moment = ("saving", appears(f"model{PARTIAL}/*"), 0.02)
EVALUATION: Moment = ("evaluation", appears("evaluation"), 0.6)
CACHED = [START_UP, CACHING, CACHING, START_UP, TRAINING, CHECKPOINT, CHECKPOINT, TRAINING, SAVING, EVALUATION]
STREAMED = [START_UP, TRAINING, CHECKPOINT, START_UP, CHECKPOINT, TRAINING, CHECKPOINT, TRAINING, SAVING, EVALUATION]


def kill_at(moment: Moment, delay: float, folder: Path, launch: Callable[[], subprocess.Popen]) -> None:
    """Start a run, wait for the moment and a while, then kill; the run must not have ended before the moment came."""
    name, has_come, _ = moment
    started, end = time.time(), time.monotonic() + PATIENCE
    process = launch()
    try:
        while not has_come(folder, started):
            assert process.poll() is None, f"the run ended (code {process.returncode}) before {name}"
            assert time.monotonic() < end, f"no {name} within {PATIENCE} s"
            time.sleep(0.0005)
        time.sleep(delay)
    finally:
        kill_all(process)


def steps_kept(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, which must all be intact."""
    return [read_checkpoint(path)["step"] for path in list_checkpoints(folder / "checkpoints")]


def images_shown(log: str) -> int:
    """Images that the progress bar of training last showed; 0 where training had not begun."""
    found = re.findall(r"training: .*?\| (\d+)/\d+ \[", log)
    return int(found[-1]) if found else 0


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "moments", "processes"),
    [
        ({"cache_features": True, "views": 6, "objective": "masked_distill", "ema_decay": 0.9}, CACHED, 1),
        ({"num_workers": 2, "gradient_accumulation_steps": 2, "epochs": 16}, STREAMED, 1),
        ({"num_workers": 1}, STREAMED, 2),
    ],
    ids=["cached", "streamed", "two-processes"],
)
def test_kill_9_at_ten_random_moments(options, tmp_path, changes, moments, processes):
    write_shards(tmp_path / "data", "train", [61, 24, 45, 30, 41])
    write_shards(tmp_path / "data", "validation", [60, 60])
    options |= {"dataset_name": str(tmp_path / "data"), "validation_split": "validation", "epochs": 12}
    options |= {"checkpoint_steps": CHECKPOINT_STEPS, "log_steps": 5, **changes}
    whole, killed = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    images_a_step = options["batch_size"] * options.get("gradient_accumulation_steps", 1) * processes
    launcher = torchrun(29521) if processes > 1 else ()

    def launch(settings: dict, log: Path):
        with open(log, "w") as output:
            return start(settings, *launcher, output=output, PYTHONUNBUFFERED="1", ACCELERATE_USE_CPU="1")

    process = launch(whole, tmp_path / "whole.log")
    assert process.wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()

    seed, folder, newest = random.randrange(10**6), Path(killed["output_dir"]), 0
    rng = random.Random(seed)
    print(f"\nseed {seed}")  # pytest shows it where the test fails
    for number, moment in enumerate(moments):
        log, delay = tmp_path / f"{number}.log", rng.uniform(0, moment[2])
        kill_at(moment, delay, folder, partial(launch, killed, log))
        text, kept = log.read_text(), steps_kept(folder)
        left = sorted(name for name in contents(folder) if name.endswith(PARTIAL)) if folder.is_dir() else []
        print(f"{number}: {moment[0]} + {delay:.3f} s, checkpoints {kept}, {images_shown(text)} images, {left}")
        went_on = re.search(r"going on after step (\d+)", text)
        assert (int(went_on[1]) if went_on else newest) == newest, "the newest checkpoint was not gone on from"
        assert "damaged" not in text and "error" not in text, text
        assert max(kept, default=0) >= newest, "a checkpoint was lost"
        newest = max(kept, default=0)
        assert images_shown(text) - newest * images_a_step <= CHECKPOINT_STEPS * images_a_step, "more steps were lost"

    process = launch(killed, tmp_path / "last.log")
    assert process.wait(timeout=300) == 0, (tmp_path / "last.log").read_text()
    assert "training is complete" in (tmp_path / "last.log").read_text()  # the last kill came after the model was saved
    expected, found = (load_file(Path(each["output_dir"]) / "model" / "model.safetensors") for each in (whole, killed))
    assert set(expected) == set(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    assert contents(Path(whole["output_dir"])) == contents(folder)
    assert not any(PARTIAL in name or ".tmp" in name for name in contents(folder))
    for name in ("model/training.json", "evaluation/results.json"):
        expected, found = (json.loads((Path(each["output_dir"]) / name).read_text()) for each in (whole, killed))
        assert expected == found, name
