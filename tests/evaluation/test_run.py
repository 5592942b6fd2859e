import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation import run as evaluation_run
from castream.evaluation.command import main
from castream.evaluation.data import Examples
from castream.evaluation.settings import AVERAGE_CONTROLS, CONTROLS, PAIRED_CONTROLS

from tests.evaluation.small import small_examples, small_image, small_model, small_processor

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EvaluationSettings(
    methods=("grad_cam",),
    metrics=("average_drop", "insertion"),
    batch_size=2,
    num_examples=1,
    controls=("temperature", "random_map"),
)


def run(folder=None, settings=SETTINGS, examples=None, model=None, processor=None):
    model, processor = model or small_model(), processor or small_processor()
    return evaluate_saliency(model, processor, examples or small_examples(9), settings, folder)


def stop_after(monkeypatch, blocks):
    """Let the run die, as by a signal, when it starts on the block after the first few."""
    original, seen = evaluation_run.evaluate_block, []

    def evaluate_block(scorer, block):
        if len(seen) == blocks:
            raise KeyboardInterrupt
        seen.append(block.number)
        return original(scorer, block)

    monkeypatch.setattr(evaluation_run, "evaluate_block", evaluate_block)
    return seen


def test_an_interrupted_run_goes_on_and_ends_with_the_same_result(tmp_path, monkeypatch):
    whole = run()
    monkeypatch.setattr(evaluation_run, "SECONDS_PER_PART", -1)  # a part a block
    for blocks in (2, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, blocks)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
        assert not (tmp_path / "results.json").exists()
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 99)
        resumed = run(tmp_path)
    assert seen == [3, 4]
    assert resumed.part.table.equals(whole.part.table)
    assert resumed.results == whole.results
    assert sorted(resumed.examples) == sorted(whole.examples)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "curves.png",
        "evaluation.json",
        "examples.png",
        "per_image.parquet",
        "results.json",
        "results.md",
    }


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    first = run(tmp_path)
    picture = (tmp_path / "examples.png").read_bytes()
    seen = stop_after(monkeypatch, 0)
    again = run(tmp_path)
    assert seen == [] and again.results == first.results
    assert (tmp_path / "examples.png").read_bytes() == picture


@pytest.mark.parametrize("difference", ["settings", "model", "dataset", "columns", "processor"])
def test_a_folder_holds_one_evaluation(tmp_path, difference):
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",))
    run(tmp_path, settings)
    other = {
        "settings": {"settings": EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",), batch_size=4)},
        "model": {"settings": settings, "model": small_model(seed=1)},
        "dataset": {"settings": settings, "examples": Examples(small_examples(9), "other")},
        "columns": {"settings": settings, "examples": Examples(small_examples(9), columns={"label": "fine"})},
        "processor": {"settings": settings, "processor": small_processor()},
    }[difference]
    if difference == "processor":
        other["processor"].image_mean = [0.5, 0.5, 0.5]
    message = {
        "settings": "batch_size: 16 there, 4 here",
        "model": "weights: ",
        "dataset": "dataset: examples there",
        "columns": "columns: {} there, {'label': 'fine'} here",
        "processor": "image_processor: ",
    }
    with pytest.raises(ValueError, match=f"holds an evaluation with other settings .*{message[difference]}"):
        run(tmp_path, **other)


@pytest.mark.parametrize(("count", "message"), [(6, "has grown"), (3, "has shrunk")])
def test_a_dataset_that_changed_is_refused(tmp_path, count, message):
    """Five images in blocks of two: the last block would otherwise be taken for finished, or images for there."""
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("sparsity",), batch_size=2)
    run(tmp_path, settings, small_examples(5))
    with pytest.raises(ValueError, match=f"examples {message} since this output_dir was begun: choose another folder"):
        run(tmp_path, settings, small_examples(count))


def test_a_folder_is_free_after_a_refusal_unless_something_is_finished_in_it(tmp_path):
    refused = EvaluationSettings(methods=("evidence",), metrics=("average_drop",))
    with pytest.raises(ValueError, match="evidence"):
        run(tmp_path, refused)
    assert not list(tmp_path.iterdir())
    run(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, refused)
    assert (tmp_path / "evaluation.json").exists()


def test_a_run_killed_while_it_wrote_its_report_goes_on(tmp_path, monkeypatch):
    """The table is there, the results are not, and a file is half-written."""
    whole = run(tmp_path / "whole")
    for step in ("write_report_examples", "write_curves"):
        with monkeypatch.context() as patch:
            patch.setattr(f"castream.evaluation.figures.{step}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "out")
        (tmp_path / "out" / "results.json.partial").write_text("{")
        (tmp_path / "out" / "partial" / "part-00000000.parquet.partial").write_text("half")
        assert not (tmp_path / "out" / "results.json").exists()
    resumed = run(tmp_path / "out")
    assert resumed.results == whole.results and sorted(resumed.examples) == sorted(whole.examples)
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("out", "whole")]
    assert names[0] == names[1]


def test_temperature_brings_gap_to_the_confidence_of_ca():
    frame = run(settings=EvaluationSettings(methods=("grad_cam",), metrics=("sparsity",), controls=("temperature",)))
    model, examples = small_model(), small_examples(9)
    pixel_values = small_processor()([example["image"] for example in examples], return_tensors="pt").pixel_values
    gap, ca = (model(pixel_values, pooling=pooling).logits for pooling in ("gap", "ca"))
    temperature = frame.results["temperature"]
    assert (gap / temperature).softmax(-1).amax(1).mean().item() == pytest.approx(
        ca.softmax(-1).amax(1).mean().item(), abs=1e-5
    )
    assert abs(temperature - 1) > 0.01


def test_temperature_of_a_multi_label_model():
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("sparsity",), controls=("temperature",))
    model, examples = small_model(problem_type="multi_label_classification"), small_examples(9)
    temperature = run(settings=settings, model=model, examples=examples).results["temperature"]
    pixel_values = small_processor()([example["image"] for example in examples], return_tensors="pt").pixel_values
    with torch.no_grad():
        gap, ca = (model(pixel_values, pooling=pooling).logits for pooling in ("gap", "ca"))
    sure = [torch.maximum(p, 1 - p).mean().item() for p in ((gap / temperature).sigmoid(), ca.sigmoid())]
    assert sure[0] == pytest.approx(sure[1], abs=1e-5) and abs(temperature - 1) > 0.01


def test_nan_logits_are_named_while_the_temperature_is_fitted():
    model = small_model()
    model.classifier.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="images image-0 to image-1: logits under gap are NaN or infinite"):
        run(model=model)


def test_temperature_needs_examples_that_can_be_read_twice():
    with pytest.raises(ValueError, match="reads the examples twice"):
        run(examples=iter(small_examples(3)))


def test_max_images():
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("sparsity",), max_images=5, batch_size=2)
    report = run(settings=settings)
    assert report.results["sample"]["images"] == 5
    endless = ({"image": small_image(index)} for index in range(10**9))
    assert run(settings=settings, examples=endless).results["sample"]["images"] == 5


def test_score_cam_is_evaluated_in_small_blocks(monkeypatch):
    """A block is what a progress bar moves by and a kill loses; a full one would take minutes."""
    sizes, evaluate_block = [], evaluation_run.evaluate_block

    def counting(scorer, block):
        sizes.append(len(block.ids))
        return evaluate_block(scorer, block)

    monkeypatch.setattr(evaluation_run, "evaluate_block", counting)
    frames = []
    for batch_size in (16, 3):
        settings = EvaluationSettings(methods=("score_cam",), metrics=("average_drop",), batch_size=batch_size)
        frames.append(run(settings=settings, examples=small_examples(5)).per_image)
    assert sizes == [2, 2, 1] + 5 * [1]
    torch.testing.assert_close(*(torch.tensor(frame["average_drop"]) for frame in frames), atol=1e-3, rtol=0)


@pytest.mark.parametrize("read_only", ["", "evaluation.json"])
def test_an_output_folder_that_cannot_be_written(tmp_path, read_only, monkeypatch):
    """A file in the place of a folder; and a finished evaluation in a folder of somebody else's."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "results"
    if read_only:
        folder = tmp_path / "out"
        run(folder)
        monkeypatch.setattr(
            Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
    with pytest.raises(ValueError, match=r"output_dir .* cannot be used: .*") as error:
        run(folder)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model, and an imagefolder of 22 images in two classes."""
    root = tmp_path_factory.mktemp("saved")
    small_model().save_pretrained(root / "model")
    small_processor().save_pretrained(root / "model")
    for index in range(22):
        folder = root / "data" / "test" / f"class-{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small_image(index).save(folder / f"{index:02d}.png")
    return root


def options(folders, output, *more):
    data = str(folders / "data")
    fixed = ["--model", str(folders / "model"), "--dataset", data, "--split", "test", "--output", str(output)]
    metrics = ["--methods", "grad_cam", "--metrics", "average_drop", "insertion", "--batch-size", "2"]
    return [*fixed, *metrics, "--controls", "temperature", *more]


@pytest.mark.parametrize(
    ("words", "poolings", "controls"),
    [
        ([], [], ()),
        (["--controls"], [], CONTROLS),
        (["--controls"], ["--poolings", "ca"], tuple(name for name in CONTROLS if name not in PAIRED_CONTROLS)),
        (["--controls", "area", "norm"], [], ("area", "norm")),
    ],
)
def test_controls_without_a_name_are_all_controls(folders, tmp_path, words, poolings, controls):
    data = ["--dataset", str(folders / "data"), "--split", "test", "--max-images", "2", "--output", str(tmp_path)]
    arguments = ["--model", str(folders / "model"), *data, "--methods", "grad_cam", "--metrics", "sparsity"]
    assert main([*arguments, *poolings, *words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["controls"] == list(controls)
    assert results["command"] == shlex.join(["python", "-m", "evaluation", *arguments, *poolings, *words])
    assert results["image_processor"]["size"] == [64, 64] and results["device"] in ("cpu", "cuda", "mps", "xpu")
    assert results["versions"]["castream"] and results["versions"]["pillow"]
    used = {row["control"] for row in results["rows"]} | {row["method"] for row in results["rows"]}
    both = {"map_only_area"} if {"map_only", "area"} <= set(controls) else set()
    assert used - {"", "grad_cam"} == (set(controls) | both) - {"randomization"}
    shuffled = ["randomization_correlation" in row for row in results["rows"]]
    assert any(shuffled) == ("randomization" in controls)


def test_the_command_in_the_results_tells_no_home(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    data = ["--dataset", "~/data", "--split", "test", "--max-images", "2", "--metrics", "sparsity", "--output", "~/out"]
    assert main(["--model", str(folders / "model"), "--methods", "grad_cam", *data]) == 0
    results = json.loads((folders / "out" / "results.json").read_text())
    assert str(folders) not in results["command"] and "--model '~/model'" in results["command"]


def test_progress_shows_the_size_of_a_folder_of_images(folders, tmp_path, capsys):
    assert main(options(folders, tmp_path / "out")) == 0
    shown = capsys.readouterr().err
    assert re.search(r"evaluating: 100%.* 22/22 \[\d\d:\d\d<00:00, +[\d.]+( images/s|s/ images)\]", shown)


def test_command(folders, tmp_path, capsys):
    assert main(options(folders, tmp_path / "out", "--max-images", "4")) == 0
    output = capsys.readouterr().out
    assert "4 images, 4 explained classes, protocol `reference`" in output
    assert "| grad_cam | CA |" in output
    assert "results.json" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/no/such/model"}, "model /no/such/model does not load"),
        ({"--dataset": "/no/such/data"}, "dataset '/no/such/data' cannot be opened"),
        ({"--split": "validation"}, "has no split 'validation', only test"),
        ({"--batch-size": "0"}, "batch_size must be at least 1, got 0"),
        ({"--image-column": "picture"}, "image_column='picture' is not in "),
    ],
)
def test_bad_input_is_one_line_and_a_status(folders, tmp_path, capsys, change, message):
    arguments = options(folders, tmp_path / "out")
    for option, value in change.items():
        arguments = [*arguments, option, value]  # the last one counts
    assert main(arguments) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("evaluation: ")]
    assert len(lines) == 1 and message in lines[0]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def launch(command, **more):
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def values(folder):
    return pd.read_parquet(folder / "per_image.parquet")


@pytest.mark.slow
def test_two_processes_count_every_image_once_and_agree_with_one(folders, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29653", "-m"]
    process = launch([*torchrun, "evaluation", *options(folders, tmp_path / "two")])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert main(options(folders, tmp_path / "one")) == 0
    pd.testing.assert_frame_equal(values(tmp_path / "two"), values(tmp_path / "one"), rtol=1e-6, atol=1e-6)
    assert sorted(values(tmp_path / "two")["index"].unique()) == list(range(22))


@pytest.mark.slow
def test_a_killed_command_goes_on(folders, tmp_path):
    """SIGKILL as soon as the first part is on disk, then the same command again."""
    slow = [sys.executable, "-c", "import evaluation.run as r; r.SECONDS_PER_PART = 0; "
            "import time; e = r.evaluate_block; "
            "r.evaluate_block = lambda s, b: (time.sleep(0.5), e(s, b))[1]; "
            "import sys; from castream.evaluation.command import main; sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    arguments = options(folders, tmp_path / "out")
    process = launch([*slow, *arguments])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("partial/part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "results.json").exists()
    assert main(arguments) == 0
    assert main(options(folders, tmp_path / "whole")) == 0
    resumed, whole = (pq.read_table(tmp_path / name / "per_image.parquet") for name in ("out", "whole"))
    assert resumed.equals(whole)  # to the bit
    for name in ("results.md", "examples.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_source_that_reads_a_cls_token_is_compared_under_its_own_name():
    model = small_model(kind="vit")
    settings = replace(SETTINGS, methods=("grad_cam", "cls_attention"), poolings=("source", "ca"))
    results = run(settings=settings, model=model).results
    rows = {(row["method"], row["pooling"]) for row in results["rows"] if not row["control"]}
    assert {("grad_cam", "source"), ("cls_attention", "ca")} <= rows
    assert set(results["accuracy"]) == {"source", "ca", "ca_minus_gap"}
    difference = results["ca_minus_gap"][0]["metrics"]["insertion"]
    means = {
        row["pooling"]: row["metrics"]["insertion"]["mean"]
        for row in results["rows"]
        if row["method"] == "grad_cam" and not row["control"]
    }
    assert difference["mean"] == pytest.approx(means["ca"] - means["source"])
    with pytest.raises(ValueError, match="pooling='gap' does not exist here"):
        run(model=model)
    with pytest.raises(ValueError, match="controls norm need a source that averages"):
        run(settings=replace(settings, controls=("norm",)), model=model)
    with pytest.raises(ValueError, match="poolings must name the source's own once"):
        replace(settings, poolings=("gap", "source"))


@pytest.mark.parametrize(
    ("words", "controls"), [([], []), (["--controls"], [name for name in CONTROLS if name not in AVERAGE_CONTROLS])]
)
def test_the_command_takes_what_a_source_without_an_average_has(folders, tmp_path, words, controls):
    small_model(kind="vit").save_pretrained(tmp_path / "vit")
    small_processor().save_pretrained(tmp_path / "vit")
    arguments = ["--model", str(tmp_path / "vit"), "--dataset", str(folders / "data"), "--split", "test"]
    arguments += ["--max-images", "4", "--metrics", "average_drop", "--output", str(tmp_path / "results")]
    assert main([*arguments, *words]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    found = results["settings"]
    assert found["poolings"] == ["source", "ca"] and found["controls"] == controls
    assert found["methods"] == ["grad_cam", "raw_attention"]
    page = (tmp_path / "results" / "results.md").read_text()
    assert "## CA minus source, paired over images" in page and "GAP" not in page


def test_what_a_source_without_an_average_lacks_is_refused_when_it_is_named(folders, tmp_path, capsys):
    small_model(kind="vit").save_pretrained(tmp_path / "vit")
    small_processor().save_pretrained(tmp_path / "vit")
    arguments = ["--model", str(tmp_path / "vit"), "--dataset", str(folders / "data"), "--split", "test"]
    for number, (words, message) in enumerate(
        (
            (["--poolings", "gap", "ca"], "pooling='gap' does not exist here"),
            (["--controls", "norm"], "controls norm need a source that averages"),
            (["--methods", "attention_cam"], "method 'attention_cam' needs a pooling over positions"),
        )
    ):
        assert main([*arguments, "--output", str(tmp_path / f"results{number}"), *words]) == 1
        assert message in capsys.readouterr().err


def test_both_names_of_an_average_give_the_same_figures():
    gap, source = (run(settings=replace(SETTINGS, poolings=(name, "ca"))).results for name in ("gap", "source"))
    for ours, theirs in zip(source["rows"], gap["rows"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
    assert source["ca_minus_gap"][0]["metrics"] == gap["ca_minus_gap"][0]["metrics"]
