"""python -m conversion: what it says and leaves behind, on good input and on bad."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from castream.conversion.classifier import load_source
from castream.conversion.command import main
from PIL import Image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from benchmarks.random_networks import write_random_source
from tests.conversion.research_network import research_state

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """What a hostile checkpoint would hold: unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def refused(capsys, *arguments) -> str:
    """Run a command that has to fail, and return its one line on stderr."""
    before = sorted(Path(arguments[arguments.index("--output") + 1]).parent.glob("*"))
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(Path(arguments[arguments.index("--output") + 1]).parent.glob("*")) == before
    return err


def small_resnet() -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")


def test_help(capsys):
    for command, words in {None: ("classifier", "official", "onnx"), "official": ("resnet50_stream",)}.items():
        with pytest.raises(SystemExit) as end:
            main(["--help"] if command is None else [command, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(word in text for word in words)


def test_a_conversion_in_its_own_process(tmp_path, capsys):
    """As a user runs it."""
    source, _ = write_random_source("transformers:resnet", tmp_path / "source")
    options = ["classifier", "--source", source, "--output", str(tmp_path / "out"), "--num-attention-heads", "2"]
    command = [sys.executable, "-m", "conversion", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "logits differ by at most" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 2 and config["freeze_classifier"]
    assert {"model.safetensors", "preprocessor_config.json", "modeling_castream.py"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert "not an empty folder" in refused(capsys, *options)


def test_final_variant_and_photos(tmp_path, capsys):
    source, _ = write_random_source("transformers:convnext", tmp_path / "source")
    (tmp_path / "photos").mkdir()
    Image.effect_noise((301, 200), 90).save(tmp_path / "photos" / "grey.png")
    options = ["--variant", "final", "--init", "reference", "--images", str(tmp_path / "photos")]
    assert main(["classifier", "--source", source, "--output", str(tmp_path / "out"), *options]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["stream_layers"] == ["stage4"] and config["init"] == "reference"
    (tmp_path / "empty").mkdir()
    arguments = ("classifier", "--source", source, "--output", tmp_path / "out2", "--images", tmp_path / "empty")
    assert "holds no .jpg" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet_1000", "timm has no model"),
        ("torchvision:alexnet", "no global average pooling"),
        ("torchvision:vgg16", "no global average pooling"),
        ("torchvision:resnet_1000", "torchvision has no classifier 'resnet_1000'"),
        ("/no/such/folder", "no folder"),
    ],
)
def test_refused_sources(tmp_path, capsys, source, message):
    assert message in refused(capsys, "classifier", "--source", source, "--output", tmp_path / "out")


def test_weights_that_would_have_to_be_downloaded(tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(ValueError, match=r"could not be had \(no route\).*--checkpoint FILE"):
        load_source("timm:resnet18")


def test_refused_transformers_folders(tmp_path, capsys):
    ResNetModel(small_resnet()).save_pretrained(tmp_path / "headless")
    ResNetForImageClassification(small_resnet()).save_pretrained(tmp_path / "no_processor")
    write_random_source("transformers:resnet", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "headless": "missing keys classifier.1.bias",
        "no_processor": "no readable preprocessor_config.json",
        "cut": "can't be loaded",
        "empty": "no readable config",
    }.items():
        error = refused(capsys, "classifier", "--source", tmp_path / name, "--output", tmp_path / "out")
        assert message in error, error


def test_refused_checkpoints(tmp_path, capsys):
    state = timm.create_model("resnet18", num_classes=5).state_dict()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "none.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    torch.save({"state_dict": state, "hostile": Payload(tmp_path / "executed")}, tmp_path / "code.pth")
    torch.save({"state_dict": {"name": "resnet18"}}, tmp_path / "words.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"fc.weight": torch.zeros(5, 512)}, tmp_path / "few.pth")
    torch.save({"conv1.weight": torch.zeros(5, 512)}, tmp_path / "no_classifier.pth")
    torch.save(state | {"fc.bias": torch.zeros(6)}, tmp_path / "classes.pth")
    for name, message in {
        "cut.pth": "damaged or cut off",
        "text.pth": "damaged or cut off",
        "none.pth": "damaged or cut off",
        "cut.safetensors": "damaged or cut off",
        "code.pth": "needs pickle code",
        "words.pth": "'name' is not a tensor",
        "list.pth": "no state_dict but a list",
        "few.pth": "does not fit resnet18",
        "no_classifier.pth": "no fc.weight",
        "classes.pth": "size mismatch for fc.bias",
        "absent.pth": "no checkpoint file",
    }.items():
        for command in (
            ("classifier", "--source", "timm:resnet18"),
            ("official", "--architecture", "resnet18_stream"),
        ):
            if command[0] == "official" and name in ("few.pth", "no_classifier.pth", "classes.pth"):
                message = "no cls_token"
            arguments = (*command, "--checkpoint", tmp_path / name, "--output", tmp_path / "out")
            error = refused(capsys, *arguments)
            assert message in error, error
    assert not (tmp_path / "executed").exists()


def test_checkpoints_of_other_networks(tmp_path, capsys):
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "whole.pth")
    for source, message in {
        "torchvision:resnet34": "does not fit resnet34",
        "torchvision:convnext_tiny": "has no classifier.2.weight",
        "pypi:efficientnet-lite0": "--checkpoint goes with",
    }.items():
        arguments = ("classifier", "--source", source, "--checkpoint", tmp_path / "whole.pth")
        assert message in refused(capsys, *arguments, "--output", tmp_path / "out")


def test_refused_outputs(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    torch.save(research_state("resnet18_final", project=False), tmp_path / "weights.pth")
    command = ("official", "--architecture", "resnet18_final", "--checkpoint", tmp_path / "weights.pth", "--output")
    assert "not an empty folder" in refused(capsys, *command, tmp_path / "file")
    assert "not an empty folder" in refused(capsys, *command, tmp_path / "full")
    assert str(tmp_path / "file") in refused(capsys, *command, tmp_path / "file" / "out")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main([str(argument) for argument in (*command, tmp_path / "empty")]) == 0


def test_refused_heads(tmp_path, capsys):
    torch.save(research_state("resnet18_stream"), tmp_path / "weights.pth")
    command = ("official", "--architecture", "resnet18_stream", "--checkpoint", tmp_path / "weights.pth")
    for heads, message in {7: "must divide the channels", 0: "at least 1"}.items():
        arguments = (*command, "--output", tmp_path / "out", "--num-attention-heads", heads)
        assert message in refused(capsys, *arguments)
