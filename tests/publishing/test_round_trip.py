"""Publish to the Hub's stand-in, then load by repo id as a stranger would: other process, no package, bit-equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from modeling_castream import CAStreamForImageClassification
from tests.fresh_process import run_fresh
from tests.hub_stand_in import TOKEN, HubStandIn
from tests.publishing.models import BACKBONES, save_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

LOAD_EVERYTHING = """
import numpy as np, torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

remote = {"trust_remote_code": True}
image, found = Image.open(IMAGE), {}
for name, revision in REPOS:
    key, remote["revision"] = f"{name}@{revision}", revision
    assert AutoConfig.from_pretrained(name, **remote).model_type == "castream"
    model = AutoModelForImageClassification.from_pretrained(name, **remote)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    found[f"{key} pixels"] = pixel_values
    with torch.no_grad():
        for pooling in ("ca", "gap"):
            found[f"{key} {pooling}"] = model(pixel_values, pooling=pooling).logits
        found[f"{key} pooled"] = AutoModel.from_pretrained(name, **remote)(pixel_values).pooler_output
    classes = pipeline("image-classification", model=name, **remote)(IMAGE, top_k=2)
    explain = pipeline("image-explanation", model=name, **remote)
    answers = explain(IMAGE, method="grad_cam", top_k=2)
    assert [answer["label"] for answer in answers] == [entry["label"] for entry in classes], (answers, classes)
    assert answers[0]["saliency"].shape == (image.height, image.width)
    found[f"{key} saliency"] = torch.from_numpy(np.stack([answer["saliency"] for answer in answers]))
    found[f"{key} overlay"] = torch.from_numpy(np.array(answers[0]["overlay"]))
    folder = snapshot_download(name, revision=revision)
    found[f"{key} weights"] = load_file(f"{folder}/model.safetensors")["castream.stream.query"]
    explain.save_pretrained(f"again/{key}")
    again = pipeline("image-explanation", model=f"again/{key}", trust_remote_code=True)
    found[f"{key} again"] = torch.from_numpy(again(IMAGE)[0]["saliency"])
save_file({key: tensor.contiguous() for key, tensor in found.items()}, "found.safetensors")
"""


def run_publish(hub, cache, *arguments, token=TOKEN) -> subprocess.CompletedProcess:
    environment = {**os.environ, **hub.environment(cache), "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "publish.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Three models published, the first one replaced by another later, and what a stranger's process found."""
    root = tmp_path_factory.mktemp("round_trip")
    photo = root / "photo.png"
    noise = torch.randint(0, 256, (70, 110, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(noise.numpy()).save(photo)
    repos = {}
    with HubStandIn() as hub:
        for kind in BACKBONES:
            save_model(root / kind, kind)
            process = run_publish(hub, root, "--model", root / kind, "--repo-id", f"someone/{kind}")
            assert process.returncode == 0, process.stderr
            repos[f"someone/{kind}", hub.repo(f"someone/{kind}").refs["main"]] = root / kind
        save_model(root / "newer", "resnet", seed=9)
        process = run_publish(hub, root, "--model", root / "newer", "--repo-id", "someone/resnet")
        assert process.returncode == 0, process.stderr
        repos["someone/resnet", "main"] = root / "newer"
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        environment = {**hub.environment(elsewhere / "cache"), "HF_TOKEN": ""}
        run_fresh(f"REPOS, IMAGE = {list(repos)!r}, {str(photo)!r}\n" + LOAD_EVERYTHING, elsewhere, **environment)
    return repos, load_file(elsewhere / "found.safetensors"), photo


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: reductions are split by thread
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("which", range(4), ids=["resnet_pinned", "convnext", "efficientnet_lite0", "resnet_newer"])
def test_a_stranger_finds_the_same_bits(loaded, one_thread, which):
    repos, found, photo = loaded
    (name, revision), folder = list(repos.items())[which]
    model = CAStreamForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    expected = {"pixels": pixel_values, "weights": model.castream.stream.query}
    with torch.no_grad():
        for pooling in ("ca", "gap"):
            expected[pooling] = model(pixel_values, pooling=pooling).logits
        expected["pooled"] = model.castream(pixel_values).pooler_output
    answers = model.explainer(processor)(str(photo), method="grad_cam", top_k=2)
    expected["saliency"] = torch.stack([torch.from_numpy(answer["saliency"]) for answer in answers])
    expected["again"] = expected["saliency"][0]
    expected["overlay"] = torch.frombuffer(bytearray(answers[0]["overlay"].tobytes()), dtype=torch.uint8)
    for key, tensor in expected.items():
        other = found[f"{name}@{revision} {key}"]
        assert torch.equal(other.reshape(tensor.shape), tensor), key


def test_the_command_says_what_it_did_and_never_the_token(tmp_path):
    model_dir = tmp_path / "model"
    save_model(model_dir)
    with HubStandIn() as hub:
        arguments = ["--model", model_dir, "--repo-id", "someone/model", "--private"]
        wrong = run_publish(hub, tmp_path, *arguments, token="hf_wrong_but_secret")
        assert wrong.returncode == 1 and not hub.repos
        assert "publish: the Hub refuses the token (401)" in wrong.stderr.splitlines()[-1]
        assert "Traceback" not in wrong.stderr
        right = run_publish(hub, tmp_path, *arguments, "--space")
        assert right.returncode == 0, right.stderr
        assert f"{hub.url}/someone/model/commit/" in right.stdout
        assert hub.repo("someone/model").private and hub.repo("someone/model", "space").private
        space = hub.files("someone/model", kind="space")
        assert {"app.py", "README.md", "requirements.txt", "model.json"} <= space.keys()
        assert hub.repo("someone/model").refs["main"].encode() in space["model.json"]
        published = [*hub.files("someone/model").values(), *space.values()]
        for secret in (TOKEN, "hf_wrong_but_secret"):
            assert not any(secret in text for text in (wrong.stdout, wrong.stderr, right.stdout, right.stderr))
            assert not any(secret.encode() in data for data in published)


def test_a_page_that_fails_after_its_model_is_said_so(tmp_path):
    save_model(tmp_path / "model")
    with HubStandIn() as hub:
        hub.fail("POST", "/api/spaces/.*/commit/", status=403)
        arguments = ["--model", tmp_path / "model", "--repo-id", "someone/model", "--space"]
        failed = run_publish(hub, tmp_path, *arguments)
        assert failed.returncode == 1
        last = failed.stderr.splitlines()[-1]
        assert last.startswith("publish: the model is published, its page is not: the token may not write"), last
        commit = hub.repo("someone/model").refs["main"]
        assert run_publish(hub, tmp_path, *arguments).returncode == 0
        assert hub.repo("someone/model").refs["main"] == commit
        assert "app.py" in hub.files("someone/model", kind="space")
