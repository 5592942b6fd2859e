"""Whole runs of train.py, in this process and in others."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from castream.publishing import PublishError
from castream.training.arguments import TrainingArguments
from castream.training.feature_cache import FeatureCache
from castream.training.logging import MetricLogger
from castream.training.loop import InterruptedRun, Interruption
from castream.training.run import EXIT_INTERRUPTED, main
from castream.training.run_folder import RunFolder
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.data.test_opening import write_tar
from tests.training.commands import kill_all, start, torchrun
from tests.training.tiny_data import CLASSES, make_row, write_shards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Killed(BaseException):
    """Stands for kill -9: nothing in the run catches it."""


@pytest.fixture
def run(fresh_process_state, monkeypatch):
    """Runs train.py's main; returns (loss, learning rate) of every optimiser step. `killed_at` ends it like a kill."""
    original, locks = MetricLogger.log, []
    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda lock, *args, **kw: locks.append(lock) or acquire(lock, *args, **kw))

    def run(options: dict, killed_at: int | None = None) -> list[tuple[float, float]]:
        trace = []

        def log(self, progress, sums, images, rate):
            trace.append((sums["loss"].item() / images, rate))
            if progress.step == killed_at:
                raise Killed
            original(self, progress, sums, images, rate)

        monkeypatch.setattr(MetricLogger, "log", log)
        fresh_process_state()
        try:
            with contextlib.suppress(Killed):
                main(TrainingArguments(**options))
        finally:
            for lock in locks:  # a dead process holds none
                lock.release(force=True)
        return trace

    return run


def weights(options: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(options["output_dir"]) / "model" / "model.safetensors")


def layout(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_workers": 2, "gradient_accumulation_steps": 2},
        {"objective": "masked_distill", "ema_decay": 0.9},
        {"cache_features": True, "views": 2, "optimizer": "sgd"},
        {"mixup": 0.4, "cutmix": 1.0},
        {"freeze_backbone": False, "freeze_classifier": False, "pooling": "gap"},
        {"objective": "mass_fidelity", "evidence_queries": ["memory", "constant"], "mask_kinds": ["soft", "blob"]},
        {"objective": "mass_fidelity", "evidence_queries": ["memory"], "cache_features": True, "views": 2},
    ],
    ids=["plain", "workers", "masked-ema", "cached", "mixed", "fine-tuned", "evidence", "cached-evidence"],
)
def test_a_run_killed_twice_is_the_uninterrupted_run(run, options, tmp_path, changes):
    whole = options | changes | {"output_dir": str(tmp_path / "whole")}
    killed = options | changes | {"output_dir": str(tmp_path / "killed")}
    expected = run(whole)
    steps = len(expected)
    traces = [run(killed, killed_at=steps // 3), run(killed, killed_at=2 * steps // 3), run(killed)]
    found = {}
    for trace in traces:  # each goes on after its last checkpoint
        start = 0 if not found else max(step for step in range(len(found) + 1) if step % 3 == 0)
        found |= dict(enumerate(trace, start))
    assert [found[step] for step in range(steps)] == expected
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    assert layout(whole["output_dir"]) == layout(killed["output_dir"])
    assert not any(name.endswith(".partial") for name in layout(killed["output_dir"]))


def test_a_classifier_is_fitted_before_masks_are_shown_to_it(run, options, monkeypatch):
    """What survives of an unfitted classifier's predictions would be cached as the evidence blocks' target."""
    build, fitted = FeatureCache.build, []

    def look(cache, accelerator, objective, *others):
        fitted.append(objective.model.classifier.weight.detach().cpu().clone())
        build(cache, accelerator, objective, *others)

    monkeypatch.setattr(FeatureCache, "build", look)
    fidelity = {"objective": "mass_fidelity", "evidence_queries": ["memory"], "mask_kinds": ["soft", "blob"]}
    assert run(options | fidelity | {"classifier": "fit", "cache_features": True, "views": 1, "epochs": 1})
    assert torch.equal(fitted[0], weights(options)["classifier.weight"])


def test_the_stream_learns_and_nothing_else_moves(run, options, tiny_model):
    trace = run(options | {"epochs": 6})
    before, after = load_file(tiny_model / "model.safetensors"), weights(options)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".stream." in name for name in moved)
    assert "castream.stream.blocks.2.projection.weight" not in moved  # W_L is frozen
    assert sum(loss for loss, _ in trace[-8:]) < sum(loss for loss, _ in trace[:8])


def test_a_complete_run_is_left_as_it_is(run, options):
    assert run(options)
    before = {name: os.stat(Path(options["output_dir"]) / name).st_mtime_ns for name in layout(options["output_dir"])}
    assert run(options) == []
    after = {name: os.stat(Path(options["output_dir"]) / name).st_mtime_ns for name in layout(options["output_dir"])}
    unchanged = {name for name in before if before[name] == after.get(name)}
    assert set(before) - unchanged <= {"settings.yaml"}


def test_a_folder_that_a_node_does_not_see_is_refused(tmp_path):
    folder = RunFolder(str(tmp_path / "elsewhere"), {}, is_main=False)
    with pytest.raises(ValueError, match="not the same folder on all nodes"):
        folder.check_shared()


def test_a_folder_of_another_run_is_refused(run, options):
    run(options)
    with pytest.raises(ValueError, match=r"holds another run \(learning_rate is 0.01 there, 0.5 here\)"):
        run(options | {"learning_rate": 0.5})


def test_a_classifier_is_fitted_for_new_classes(run, options, tmp_path):
    write_shards(tmp_path / "data", "train", [12, 12], classes=["red", "green", "blue", "grey"])
    options = options | {"dataset_name": str(tmp_path / "data"), "views": 1, "augmentation": "none", "epochs": 1}
    run(options)
    config = json.loads((Path(options["output_dir"]) / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["red", "green", "blue", "grey"]
    assert (Path(options["output_dir"]) / "initial" / "model.safetensors").is_file()


def test_too_many_broken_images_stop_the_run(run, options, tmp_path):
    write_shards(tmp_path / "data", "train", [160, 160], broken=tuple(range(0, 320, 20)))
    options = options | {"dataset_name": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"could not be decoded, more than max_bad_fraction=0\.01"):
        run(options)
    listed = (Path(options["output_dir"]) / "bad_images.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) >= 3
    assert run(options | {"max_bad_fraction": 0.1})


def test_a_loss_that_is_no_number_stops_with_the_culprits(run, options, monkeypatch):
    from castream.training.objective import Objective

    original = Objective.forward

    def forward(self, batch):
        result = original(self, batch)
        return result | {"loss": result["loss"] * (float("nan") if "2:3" in batch["keys"] else 1)}

    monkeypatch.setattr(Objective, "forward", forward)
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+ with learning rate .*2:3"):
        run(options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation_methods": ["grad_cam", "magic_cam"]}, "methods must be different names"),
        ({"tracker": "wandb"}, "tracker=wandb is not installed"),
        ({"push_to_hub": True, "hub_model_id": "someone/tiny"}, "needs a token"),
        ({"push_to_hub": True, "hub_model_id": "some one/tiny"}, "some one/tiny"),
        ({"stream_layers": ["stage9"]}, "stage9"),
        ({"classifier": "keep", "class_names": ["a", "b"]}, "has 2 classes (a, ...), and the model 3"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_the_start(run, options, monkeypatch, changes, said):
    monkeypatch.setattr("castream.training.run.get_available_trackers", list)
    monkeypatch.setattr("castream.training.run.get_token", lambda: None)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        run(options | changes)
    assert "\n" not in str(error.value)
    assert not (Path(options["output_dir"]) / "checkpoints").exists()


def test_held_out_labels_are_checked_before_training(run, options, tmp_path):
    write_shards(tmp_path / "data", "train", [12])
    write_shards(tmp_path / "data", "validation", [12], classes=["red", "green", "blue", "grey"], labels=4)
    options = options | {
        "dataset_name": str(tmp_path / "data"),
        "validation_split": "validation",
        "class_names": CLASSES,
    }
    with pytest.raises(ValueError, match=r"label 3 of sample validation-00000.parquet:3 is outside 0\.\.2"):
        run(options)
    assert not (Path(options["output_dir"]) / "checkpoints").exists()


def test_photos_in_folders_need_no_classes_without_labels(run, options, tmp_path):
    for index in range(8):
        path = tmp_path / "photos" / "train" / ("holiday", "garden")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_row(index)["image"]["bytes"])
    options = options | {"dataset_name": str(tmp_path / "photos"), "classifier": "keep", "objective": "distill"}
    assert len(run(options)) == 4


@pytest.mark.parametrize("cached", [False, True])
def test_a_dataset_of_broken_images_is_no_run(run, options, tmp_path, cached):
    write_shards(tmp_path / "data", "train", [12], broken=tuple(range(12)))
    options = options | {"dataset_name": str(tmp_path / "data"), "cache_features": cached, "views": 1}
    with pytest.raises(ValueError, match=r"no image that can be decoded|12 of 12 images could not be decoded"):
        run(options)
    assert not (Path(options["output_dir"]) / "model").exists()


def test_a_few_broken_images_of_a_small_dataset_stop_the_run(run, options, tmp_path):
    write_shards(tmp_path / "data", "train", [40], broken=(3,))
    options = options | {"dataset_name": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"1 of 40 images could not be decoded, more than max_bad_fraction=0\.01"):
        run(options)
    assert run(options | {"max_bad_fraction": 0.03})


def test_weights_that_are_no_numbers_are_never_kept(run, options, monkeypatch):
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[:] = float("nan")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(ValueError, match=r"the loss is nan at step 2|is no longer finite after step 1"):
        run(options | {"checkpoint_steps": 1})
    assert not (Path(options["output_dir"]) / "checkpoints").exists()


@pytest.mark.parametrize("changes", [{}, {"freeze_output_projection": False, "checkpoint_steps": 1000}])
def test_a_run_that_diverged_is_not_done(run, options, changes):
    with pytest.raises(ValueError, match="the run has diverged") as error:
        run(options | {"learning_rate": 1e3, "max_grad_norm": 0.0} | changes)
    assert "\n" not in str(error.value) and "lower learning_rate" in str(error.value)
    assert not (Path(options["output_dir"]) / "model").exists()


def test_a_config_keeps_its_problem_type_where_the_stream_is_rebuilt(run, options, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"problem_type": "multi_label_classification", "license": "mit"})
    )
    run(options | {"model": str(tmp_path / "model"), "variant": "final", "max_steps": 1})
    written = json.loads((Path(options["output_dir"]) / "model" / "config.json").read_text())
    assert (written["problem_type"], written["license"]) == ("multi_label_classification", "mit")
    assert (written["variant"], written["stream_layers"]) == ("final", ["stage2"])


def test_a_model_folder_whose_weights_do_not_fit_is_refused(run, options, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    prefixed = {f"module.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights that do not fit its config.json") as error:
        run(options | {"model": str(folder)})
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def one_logit(tiny_model, tmp_path):
    """Makes a folder with a network of a single logit."""

    def make(problem_type):
        folder = tmp_path / "one-logit"
        shutil.copytree(tiny_model, folder)
        config = CAStreamConfig.from_pretrained(tiny_model, id2label={0: "cat"}, label2id={"cat": 0})
        config.problem_type = problem_type
        CAStreamForImageClassification(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("problem_type", "objective"),
    [(None, "cross_entropy"), ("multi_label_classification", "distill"), ("regression", "masked_distill")],
)
def test_networks_of_a_single_logit_learn(run, options, one_logit, tmp_path, problem_type, objective):
    write_shards(tmp_path / "data", "train", [12, 12], classes=["dog", "cat"], labels=2)
    options = options | {"model": one_logit(problem_type), "dataset_name": str(tmp_path / "data"), "classifier": "keep"}
    before = load_file(Path(options["model"]) / "model.safetensors")
    trace = run(options | {"objective": objective, "augmentation": "none", "epochs": 4})
    assert any(not torch.equal(before[name], value) for name, value in weights(options).items())
    config = json.loads((Path(options["output_dir"]) / "model" / "config.json").read_text())
    assert config.get("problem_type") == problem_type and len(config["id2label"]) == 1
    if objective == "cross_entropy":
        assert sum(loss for loss, _ in trace[-6:]) < sum(loss for loss, _ in trace[:6])


def test_files_have_the_mode_that_the_user_gives_files(run, options):
    before = os.umask(0o022)
    try:
        run(options | {"max_steps": 1})
    finally:
        os.umask(before)
    files = [path for path in Path(options["output_dir"]).rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in files} > {"model.safetensors", "config.json", "settings.yaml"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("objective", ["masked_distill", "mass_fidelity"])
def test_bf16_with_cached_features(run, options, objective, cached, tmp_path):
    write_shards(tmp_path / "data", "train", [12, 12], classes=["red", "green", "blue", "grey"])
    options = options | {"dataset_name": str(tmp_path / "data"), "views": 1, "mixed_precision": "bf16", "epochs": 1}
    evidence = {"evidence_queries": ["memory", "constant"]} if objective == "mass_fidelity" else {}
    assert run(options | evidence | {"cache_features": cached, "objective": objective})


def test_a_failed_push_says_where_the_model_is(run, options, monkeypatch):
    def publish(*args, **kwargs):
        raise PublishError("the Hub has a problem of its own (503).")

    monkeypatch.setattr("castream.training.run.publish", publish)
    monkeypatch.setenv("HF_TOKEN", "anything")
    options = options | {"push_to_hub": True, "hub_model_id": "someone/tiny"}
    model = Path(options["output_dir"]) / "model"
    with pytest.raises(OSError, match=rf"not pushed: .*\(503\)\. The model is complete in {model}"):
        run(options)
    monkeypatch.setattr("castream.training.run.publish", lambda *args, **kwargs: FakePublished)
    assert run(options) == [] and (model / "model.safetensors").is_file()


def test_tar_shards_killed_and_resumed(run, options, tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"data/train-{shard}.tar", [make_row(index) for index in range(7 * shard, 7 * shard + 7)])
    options = options | {"dataset_name": str(tmp_path / "data"), "train_examples": 21, "num_workers": 2}
    expected = run(options | {"output_dir": options["output_dir"] + "-whole"})
    run(options, killed_at=5)
    assert run(options) == expected[3:]


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"compile_backbone": True, "max_steps": 2}])
def test_bf16_and_a_compiled_backbone(run, options, changes):
    trace = run(options | changes)
    plain = run(options | {"output_dir": options["output_dir"] + "-plain", "max_steps": changes.get("max_steps")})
    assert [loss for loss, _ in trace] == pytest.approx([loss for loss, _ in plain], rel=0.05)


def test_any_subset_of_depths_can_be_trained(run, options):
    run(options | {"stream_layers": ["stage1", "stage2"], "epochs": 1})
    facts = json.loads((Path(options["output_dir"]) / "model" / "training.json").read_text())
    assert facts["layers"] == ["stage1", "stage2"]


def test_a_signal_after_the_last_step_is_not_forgotten(fresh_process_state):
    interruption = Interruption()
    with pytest.raises(InterruptedRun, match="goes on from here"), interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher's end may send one, too
        assert interruption.requested


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_own_code(options, tmp_path, number):
    options = options | {"epochs": 500, "max_steps": 2000, "checkpoint_steps": 1000, "num_workers": 1}
    process = start(options)
    logs = Path(options["output_dir"])
    while process.poll() is None and "training:" not in (line := process.stderr.readline()):
        assert "error" not in line
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "Traceback" not in errors and "the same command goes on from there" in errors
    assert len(list((logs / "checkpoints").iterdir())) == 1
    output, errors = start(options).communicate(timeout=300)
    assert "exactly there" in output, errors


SLOW_STEPS = """
import sys, time
from castream.training.objective import Objective
from castream.training.run import run

forward = Objective.forward

def slow(self, batch):
    time.sleep(1.5)
    return forward(self, batch)

Objective.forward = slow
sys.exit(run())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_launchers_group_saves_slow_steps(options, tmp_path, processes, number):
    """As Ctrl-C in a terminal does: the launcher gets it, too, and its end is one more signal to train.py."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_STEPS)
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--cpu")
    launcher = (sys.executable, *launch) if processes == 1 else torchrun(29516)
    options = options | {"epochs": 500, "checkpoint_steps": 1000}
    with open(tmp_path / "log", "w") as output:
        process = start(options, *launcher, script=script, output=output, ACCELERATE_USE_CPU="1")
    family = psutil.Process(process.pid)
    try:
        wait_for(lambda: re.search(r"training: .*\| (1[2-9]|[2-9]\d)/", (tmp_path / "log").read_text()))
        family = [*family.children(recursive=True)]
        os.killpg(process.pid, number)
        process.wait(timeout=60)
        psutil.wait_procs(family, timeout=60)
    finally:
        kill_all(process)
    log = (tmp_path / "log").read_text()
    assert "told to stop: saving after this step" in log
    step = int(re.search(r"stopped after step (\d+): the same command goes on from there", log)[1])
    kept = [path.name for path in (Path(options["output_dir"]) / "checkpoints").iterdir()]
    assert step >= 2 and kept == [f"step-{step:08d}"]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "timm:no_such_network"}, "no_such_network"),
        ({"model": "nonsense"}, "nonsense"),
        ({"no_such_option": 1}, "unknown option --no_such_option"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"dataset_name": "./nowhere"}, "nowhere"),
        ({"output_dir": "/proc/nowhere"}, "cannot write output_dir=/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_a_code(options, changes, said):
    process = start(options | changes)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert process.returncode == 2 and len(lines) == 1 and said in lines[0], errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(options, tmp_path):
    write_shards(tmp_path / "data", "train", [16, 16])
    options = options | {"dataset_name": str(tmp_path / "data"), "shuffle_window": 0, "tracker": "tensorboard"}
    one = options | {"output_dir": str(tmp_path / "one"), "batch_size": 8}
    two = options | {"output_dir": str(tmp_path / "two"), "batch_size": 4}
    launcher = torchrun(29511)
    for process in (start(one), start(two, *launcher, ACCELERATE_USE_CPU="1")):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-4, atol=1e-6)
    assert learning_rates(one) == pytest.approx(learning_rates(two), rel=1e-6)


@pytest.mark.slow
def test_uneven_shards_end_without_a_hang(options, tmp_path):
    write_shards(tmp_path / "data", "train", [21, 5, 3])
    options = options | {"dataset_name": str(tmp_path / "data"), "tracker": "tensorboard"}
    launcher = torchrun(29512)
    process = start(options, *launcher, ACCELERATE_USE_CPU="1")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    facts = json.loads((Path(options["output_dir"]) / "model" / "training.json").read_text())
    assert facts["progress"]["images"] == 2 * 29 and facts["progress"]["epoch"] == 2


def read_log(options: dict) -> EventAccumulator:
    (events,) = {path.parent for path in Path(options["output_dir"]).rglob("events.out*") if path.parent.name == "logs"}
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def learning_rates(options: dict) -> list[float]:
    return [event.value for event in read_log(options).Scalars("learning_rate")]


def test_what_a_run_leaves_behind(run, options, monkeypatch, capsys):
    pushed = []
    monkeypatch.setenv("HF_TOKEN", "anything")
    monkeypatch.setattr("castream.training.run.publish", lambda *args, **kw: pushed.append((args, kw)) or FakePublished)
    options = options | {"validation_split": "validation", "tracker": "tensorboard", "saliency_steps": 4, "epochs": 4}
    run(options | {"push_to_hub": True, "hub_model_id": "someone/tiny", "evaluation_metrics": ["average_gain"]})
    folder = Path(options["output_dir"])
    log = read_log(options)
    layers = json.loads((folder / "model" / "training.json").read_text())["layers"]
    wanted = {"loss", "accuracy", "learning_rate", "images_per_second", "epoch"}
    assert wanted | {f"attention_entropy/{layer}" for layer in layers} <= set(log.Tags()["scalars"])
    pictures = log.Images("saliency")
    assert len(pictures) == 8 and (pictures[0].height, pictures[0].width) == (3 * 32, 8 * 32)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "checkpoints",
        "evaluation",
        "logs",
        "model",
        "settings.yaml",
    }
    assert {"results.json", "results.md", "examples.png"} <= {path.name for path in (folder / "evaluation").iterdir()}
    assert pushed == [((folder / "model", "someone/tiny"), {"results_dir": folder / "evaluation"})]
    output = capsys.readouterr().out
    assert "relative to uniform (1), before and after training" in output and "pushed: http" in output
    lines = output.strip().splitlines()[-3:]
    assert lines[0].startswith("from transformers import") and all("from_pretrained" in line for line in lines[1:])


class FakePublished:
    url = "https://example.com/someone/tiny"


def test_fine_tuning_then_the_stream_on_several_labels_per_image(run, options, tmp_path):
    for split, indices in (("train", range(12)), ("val", range(12, 18))):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        lines = []
        for index in indices:
            row = make_row(index)
            (folder / f"{index}.jpg").write_bytes(row["image"]["bytes"])
            lines.append({"file_name": f"{index}.jpg", "labels": [CLASSES[index % 3], "noise"]})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = options | {"dataset_name": str(tmp_path / "data"), "class_names": [*CLASSES, "noise"], "interleave": 1}
    tuned = options | {"output_dir": str(tmp_path / "gap"), "pooling": "gap", "classifier": "fit"}
    run(tuned | {"freeze_backbone": False, "freeze_classifier": False, "views": 1})
    before = weights(tuned)
    stream = options | {"model": str(tmp_path / "gap" / "model"), "validation_split": "val"}
    run(stream | {"evaluation_metrics": ["average_drop"], "evaluation_methods": ["grad_cam"]})
    after = weights(stream)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".stream." in name for name in moved)
    scores = json.loads((Path(options["output_dir"]) / "mean_average_precision.json").read_text())
    assert scores["images"] == 6 and 0 < scores["gap"] <= 100
    assert (Path(options["output_dir"]) / "evaluation" / "results.json").is_file()
    card = (Path(options["output_dir"]) / "model" / "README.md").read_text()
    assert "multi" in json.loads((Path(options["output_dir"]) / "model" / "config.json").read_text())["problem_type"]
    assert card.startswith("---")


def test_a_corrupt_checkpoint_is_passed_over_aloud(run, options, capsys):
    expected = run(options | {"output_dir": options["output_dir"] + "-whole"})
    run(options, killed_at=8)
    newest = max((Path(options["output_dir"]) / "checkpoints").iterdir())
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 255
    (newest / "optimizer.pt").write_bytes(data)
    capsys.readouterr()
    trace = run(options)
    assert "checkpoint step-00000006 is damaged (optimizer.pt does not match its checksum)" in capsys.readouterr().out
    assert trace == expected[3:]


def test_a_shard_that_vanishes_costs_nothing_once_it_is_back(run, options, tmp_path):
    write_shards(tmp_path / "data", "train", [11, 7, 9, 5])
    options = options | {"dataset_name": str(tmp_path / "data"), "epochs": 1, "interleave": 1, "shuffle_window": 0}
    expected = run(options | {"output_dir": options["output_dir"] + "-whole"})
    run(options, killed_at=4)
    shard, hidden = tmp_path / "data" / "train-00001.parquet", tmp_path / "hidden"
    shard.rename(hidden)
    shard.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"train-00001") as error:
        run(options)
    assert "\n" not in str(error.value)
    shard.unlink()
    hidden.rename(shard)
    assert run(options) == expected[3:]


def test_weights_of_another_network_are_refused(run, options, tiny_model, tmp_path):
    """The folder that `model` names may hold another network than when the run began."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    options = options | {"model": str(folder), "variant": "final"}
    run(options, killed_at=8)
    config = CAStreamConfig.from_pretrained(folder)
    wider = config.backbone_config
    wider.hidden_sizes = [8, 24]
    config.stream_channels = None
    CAStreamForImageClassification(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"checkpoint .* belongs to another model: castream.stream.query"):
        run(options)


@pytest.mark.slow
def test_two_processes_told_to_stop_go_on_as_one_at_the_next_epoch(options):
    options = options | {"epochs": 40, "checkpoint_steps": 1000, "num_workers": 1}
    process = start(options, *torchrun(29514), ACCELERATE_USE_CPU="1")
    try:
        while process.poll() is None and "training:" not in process.stderr.readline():
            pass
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        kill_all(process)
    assert process.returncode != 0 and "stopped after step" in errors, errors
    (kept,) = (Path(options["output_dir"]) / "checkpoints").iterdir()
    process = start(options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"going on after step {int(kept.name[5:])} at the start of epoch" in output
    assert "so the rest of the epoch before is left out" in output


@pytest.mark.slow
def test_fewer_shards_than_processes_are_refused(options, tmp_path):
    write_shards(tmp_path / "data", "train", [12])
    process = start(options | {"dataset_name": str(tmp_path / "data")}, *torchrun(29515), ACCELERATE_USE_CPU="1")
    _, errors = process.communicate(timeout=120)
    lines = {line for line in errors.splitlines() if line.startswith("train.py: error: ")}
    assert process.returncode != 0 and len(lines) == 1 and "1 shards for 2 processes" in lines.pop(), errors


@pytest.mark.slow
def test_one_rank_killed_ends_the_others(options):
    options = options | {"epochs": 500, "max_steps": 5000, "checkpoint_steps": 5000}
    launcher = torchrun(29513)
    process = start(options, *launcher, ACCELERATE_USE_CPU="1")
    while process.poll() is None and "training:" not in process.stderr.readline():
        pass
    time.sleep(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_a_full_disk_during_a_checkpoint(options, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk]).returncode:
        pytest.skip("only root can make a small disk")
    try:
        options = options | {"output_dir": str(disk / "run"), "checkpoint_steps": 1, "epochs": 90}
        process = start(options | {"keep_checkpoints": 1000})
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2, errors
        lines = [line for line in errors.splitlines() if "train.py: error" in line]
        assert len(lines) == 1 and "No space left on device" in lines[0] and "Traceback" not in errors
        assert not list(disk.rglob("*.partial"))
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        output, errors = start(options).communicate(timeout=200)
        assert f"going on after step {int(kept[-1][5:])}" in output, errors
    finally:
        subprocess.run(["umount", disk])
