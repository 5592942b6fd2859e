"""Folders whose weights do not fit are refused in one line, whoever opens them."""

import json

import pytest
import torch
from castream.artifacts.models import fingerprint_folder, fingerprint_model, load_image_processor, load_model
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification


@pytest.fixture
def folder(tmp_path):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=backbone, num_labels=3))
    model.save_pretrained(tmp_path)
    BitImageProcessor().save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_whole_folder(folder):
    model = load_model(folder)
    assert not model.training
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    assert load_image_processor(folder).crop_size["height"] == 224


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def without_classifier(folder):
    change_weights(folder, lambda weights: {name: v for name, v in weights.items() if "classifier" not in name})


def of_a_parallel_module(folder):
    change_weights(folder, lambda weights: {f"module.{name}": value for name, value in weights.items()})


def with_something_else(folder):
    change_weights(folder, lambda weights: weights | {"extra.weight": torch.zeros(2)})


def of_other_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps(config))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "resnet"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, "does not load: "),
        (without_classifier, "2 missing keys: classifier.bias, classifier.weight"),
        (of_a_parallel_module, r"missing keys: castream\."),
        (with_something_else, "1 unexpected keys: extra.weight"),
        (of_other_classes, "2 mismatched keys: classifier.bias, classifier.weight"),
        (without_weights, "does not load: .*safetensors"),
        (of_another_kind, "it is a resnet, not a castream model; convert it first"),
    ],
)
def test_what_does_not_fit_is_refused(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=said) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_place_of_its_folder_is_refused(folder):
    for load in (load_model, load_image_processor):
        with pytest.raises(ValueError, match=r"config\.json is a file: give its folder, ") as error:
            load(folder / "config.json")
        assert "\n" not in str(error.value)


def test_a_name_that_leads_nowhere_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"model .*nowhere does not load: ") as error:
        load_model(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_home_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model(f"~/{folder.name}").config.num_labels == 3


def test_a_folder_and_its_model_have_one_fingerprint_and_other_weights_another(folder):
    model = load_model(folder)
    found = fingerprint_model(model)
    assert fingerprint_folder(folder) == found
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1 and fingerprint_folder(folder / "shards") == found
    with torch.no_grad():
        model.classifier.bias[0] += 1
    assert fingerprint_model(model) != found
    assert fingerprint_folder(folder / "nothing") is None
