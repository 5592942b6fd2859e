"""The command line: each sub-command reaches its room with its options as given, and --help needs no room."""

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from castream import command


def invoke(*arguments):
    return CliRunner().invoke(command.app, list(arguments))


@pytest.mark.parametrize(
    ("room", "arguments", "passed"),
    [
        ("conversion", ["convert", "--source", "a"], ["classifier", "--source", "a"]),
        ("conversion", ["convert", "official", "--help"], ["official", "--help"]),
        ("conversion", ["onnx", "--model", "a"], ["onnx", "--model", "a"]),
        ("evaluation", ["evaluate", "--methods", "b", "c"], ["--methods", "b", "c"]),
        ("publishing", ["publish", "--dry-run"], ["--dry-run"]),
    ],
)
def test_options_reach_the_room(monkeypatch, room, arguments, passed):
    called = []

    def main(argv, prog):
        called.append((argv, prog))
        return 3

    monkeypatch.setattr(f"castream.{room}.command.main", main)
    result = invoke(*arguments)
    assert result.exit_code == 3 and called[0][0] == passed and called[0][1].startswith("castream")


@pytest.mark.parametrize("name", ["convert", "evaluate", "publish"])
def test_help_speaks_of_the_command(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0 and f"usage: castream {name}" in result.output


def test_train_becomes_the_launcher(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("os.execv", lambda path, argv: started.append(argv))
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--config", "photos_distill.yaml", "--dataset_name", "my photos")
    (argv,) = started
    assert argv[:6] == [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-m", "castream.training"]
    assert argv[6] == "--config" and argv[7].endswith("recipes/photos_distill.yaml")
    assert argv[8:] == ["--dataset_name", "my photos"]
    assert "accelerate launch -m castream.training" in result.output and "'my photos'" in result.output
    (tmp_path / "photos_distill.yaml").write_text("")
    invoke("train", "--config", "photos_distill.yaml")
    assert started[-1][7] == "photos_distill.yaml"  # one's own goes first


@pytest.mark.parametrize(("name", "extra"), [("train", "train"), ("onnx", "onnx"), ("app", "app")])
def test_a_missing_extra_is_named(monkeypatch, name, extra):
    real = importlib.util.find_spec
    hidden = {"accelerate", "onnxscript", "gradio"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else real(name))
    result = invoke(name, "--help")
    assert result.exit_code == 2 and f"pip install 'castream[{extra}]'" in result.output
    assert len(result.output.splitlines()) == 1


def test_help_imports_no_room():
    code = (
        "import sys; from typer.testing import CliRunner; from castream.command import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_explaining_leaves_the_other_rooms_packages_alone(model_dir):
    code = (
        "import sys; from castream.sources import load_pipeline; import castream.explain\n"
        f"load_pipeline({str(model_dir)!r})\n"
        "print(sorted({'timm', 'datasets', 'evaluate', 'matplotlib', 'pandas', 'httpx', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
