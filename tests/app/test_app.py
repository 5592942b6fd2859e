"""The page's command: what it loads, and the one line in which it refuses."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from app.app import load, main
from modeling_castream import CAStreamForImageClassification
from tests.modeling_castream.tiny import tiny_model
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


def test_a_model_of_one_depth_has_no_slider_of_depths(folder, tmp_path):
    """Such as the demo's own; a slider from 1 to 1 is none to Gradio."""
    pytest.importorskip("gradio")
    from explanation import Explainer
    from page import build_page
    from rendering import to_html, to_picture

    tiny_model(variant="final").save_pretrained(tmp_path / "final")
    AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "final")
    sliders = {}
    for path in (folder, tmp_path / "final"):
        explainer = Explainer(load(str(path), None)[0])
        (sliders[path.name],) = [
            block for block in build_page(explainer, "model").blocks.values() if block.elem_id == "depth"
        ]
        photo = Image.new("RGB", (90, 60), (200, 30, 60))
        explanation = explainer.explain(photo, 0)
        assert len(explanation.attention) == len(explainer.depths) == sliders[path.name].value
        assert f'data-depth="{sliders[path.name].value}"' in to_html(explanation, explainer.colors, 0.5, 1)
        assert to_picture(explanation, explainer.colors, 0.5, 1).width > 0
    assert sliders["model"].visible and not sliders["final"].visible


def test_a_regression_is_refused_in_one_line(tmp_path, capsys):
    save_model(tmp_path / "model")
    model = CAStreamForImageClassification.from_pretrained(tmp_path / "model")
    model.config.problem_type = "regression"
    model.config.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model")]) == 1
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("app: problem_type is 'regress")]
