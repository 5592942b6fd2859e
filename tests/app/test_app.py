"""The page's command: what it loads, and the one line in which it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.app import load, main
from tests.publishing.models import save_model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_loaded_as_it_was_saved(folder):
    pipe, title = load(str(folder), None)
    assert title == "model" and type(pipe).__name__ == "ImageExplanationPipeline" and not pipe.model.training
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(pipe.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"module.{name}", "weights do not fit its config.json"),
        (lambda name: name.replace("classifier", "other"), "4 weights do not fit its config.json"),
    ],
)
def test_weights_that_do_not_fit_are_not_served(folder, capsys, change, said):
    path = folder / "model.safetensors"
    save_file({change(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert main(["--model", str(folder)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("app: ")]
    assert said in line


def test_a_file_in_place_of_its_folder(folder, capsys):
    assert main(["--model", str(folder / "config.json")]) == 1
    assert "is neither a folder nor a Hub id" in capsys.readouterr().err
