"""Checkpoints as training leaves them: what is in them is taken, or refused by name."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from castream.conversion import convert_classifier
from castream.conversion.checkpoint import read_checkpoint
from castream.conversion.classifier import load_source
from castream.conversion.command import main
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

NAME = "resnet10t"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).eval()


def weights(path, **options) -> dict[str, torch.Tensor]:
    return load_source(f"timm:{NAME}", str(path), **options).state


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_wrappers_are_looked_through(network, tmp_path, prefix, key):
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3, "loss": np.float64(0.5)}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt").state
    assert list(found) == list(network.state_dict())
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_half_precision_becomes_float32(network, tmp_path):
    torch.save(timm.create_model(NAME, num_classes=5).half().state_dict(), tmp_path / "half.pth")
    assert {value.dtype for value in weights(tmp_path / "half.pth").values()} == {torch.float32, torch.int64}


def timm_file(network, path, **arguments) -> dict[str, torch.Tensor]:
    """timm's model_best.pth.tar, whose EMA weights are twice the raw ones; returns the EMA weights."""
    averaged = {name: value * 2 for name, value in network.state_dict().items()}
    content = {"arch": NAME, "state_dict": network.state_dict(), "state_dict_ema": averaged, "metric": np.float32(71)}
    torch.save(content | {"args": argparse.Namespace(**{"model": NAME, **arguments})}, path)
    return averaged


def test_timm_s_training_file(network, tmp_path, capsys):
    path = tmp_path / "model_best.pth.tar"
    averaged = timm_file(network, path, input_size=[3, 64, 64], mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    assert torch.equal(weights(path)["fc.weight"], averaged["fc.weight"])
    assert torch.equal(weights(path, ema=False)["fc.weight"], network.state_dict()["fc.weight"])
    source = load_source(f"timm:{NAME}", str(path))
    assert tuple(source.image_processor.image_mean) == (0.5,) * 3
    assert (source.image_processor.crop_size.height, source.image_processor.crop_size.width) == (64, 64)
    command = ["classifier", "--source", f"timm:{NAME}", "--checkpoint", str(path), "--output"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "averaged")]) == 0
    assert "state_dict_ema; it has the raw weights, too" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "raw"), "--no-ema"]) == 0
    assert "state_dict; it has EMA weights, too" in capsys.readouterr().out


def test_ema_that_is_not_there(network, tmp_path):
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="has no EMA weights, only state_dict, epoch"):
        weights(tmp_path / "a.pth", ema=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gp": "max"}, "it takes the maximum over positions"),
        ({"model": "resnet18"}, "is of resnet18, not of resnet10t"),
    ],
)
def test_what_the_training_s_arguments_forbid(network, tmp_path, arguments, message):
    timm_file(network, tmp_path / "model_best.pth.tar", **arguments)
    with pytest.raises(ValueError, match=message):
        weights(tmp_path / "model_best.pth.tar")


def test_the_config_beside_a_file_counts(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    settings = {"input_size": [3, 128, 128], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": NAME, "num_classes": 5, "label_names": list("abcde"), "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = load_source(f"timm:{NAME}", str(tmp_path / "pytorch_model.bin"))
    assert source.image_processor.crop_size.height == 128 and tuple(source.image_processor.image_std) == (0.5,) * 3
    assert list(source.config["id2label"].values()) == list("abcde")


@pytest.mark.parametrize(
    "content",
    [
        {"classes": list("vwxyz")},
        {"class_to_idx": {"z": 4, "y": 3, "x": 2, "w": 1, "v": 0}},
        {"hyper_parameters": {"class_names": list("vwxyz")}},
    ],
)
def test_labels_of_a_checkpoint(network, tmp_path, content):
    torch.save({"state_dict": network.state_dict(), **content}, tmp_path / "a.pth")
    source = load_source(f"timm:{NAME}", str(tmp_path / "a.pth"))
    assert list(source.config["id2label"].values()) == list("vwxyz")
    given = load_source(f"timm:{NAME}", str(tmp_path / "a.pth"), labels=list("klmno"))
    assert given.config["label2id"]["o"] == 4
    with pytest.raises(ValueError, match="2 labels were given for 5 classes"):
        load_source(f"timm:{NAME}", str(tmp_path / "a.pth"), labels=["a", "b"])


def test_heads(network, tmp_path):
    state = network.state_dict()
    behind_dropout = {name.replace("fc.", "fc.1."): value for name, value in state.items()}
    torch.save(behind_dropout, tmp_path / "dropout.pth")
    assert torch.equal(weights(tmp_path / "dropout.pth")["fc.weight"], state["fc.weight"])
    torch.save({**behind_dropout, "fc.4.weight": torch.zeros(5, 5)}, tmp_path / "mlp.pth")
    with pytest.raises(
        ValueError, match=r"head of several layers \(fc\.1\.weight, fc\.4\.weight\).*one linear layer convert"
    ):
        weights(tmp_path / "mlp.pth")


def test_a_model_in_memory(network):
    model, processor = convert_classifier(network)
    assert torch.equal(model.classifier.weight, network.fc.weight) and processor.crop_size.height == 176
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    resnet = ResNetForImageClassification(config)
    model, _ = convert_classifier(resnet, image_processor=ConvNextImageProcessor(size={"shortest_edge": 64}))
    assert torch.equal(model.classifier.weight, resnet.classifier[1].weight) and model.config.num_labels == 4
    with pytest.raises(ValueError, match="image_processor is missing"):
        convert_classifier(resnet)
    with pytest.raises(ValueError, match="model of class Linear"):
        convert_classifier(torch.nn.Linear(2, 2))


def test_arguments_of_a_model_in_memory():
    """Image size and pooling show in it; a replaced head and other options can't be told, and say so."""
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(ValueError, match=r"not timm's vit_tiny_patch16_224 \(.* differs\).*save_for_hf"):
        convert_classifier(timm.create_model("vit_tiny_patch16_224", global_pool="avg", **options))
    network = timm.create_model("test_vit", num_classes=3, global_pool="avg", img_size=96)
    model, processor = convert_classifier(network)
    assert model.config.backbone_config.model_args == {"global_pool": "avg", "img_size": (96, 96)}
    assert processor.crop_size.height == 96
    network = timm.create_model(NAME, num_classes=3)
    network.fc = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"not timm's resnet10t \(fc\.0\.weight differs\)"):
        convert_classifier(network)
