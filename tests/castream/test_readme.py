"""The README's way with a small demo: train, look at the page, publish, load from the Hub, explain; and the Space."""

import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.castream.conftest import draw_photo
from tests.fresh_process import fetch_page
from tests.hub_stand_in import HubStandIn

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REPO = "someone/demo"
CASTREAM = (sys.executable, "-c", "from castream.command import main; main()")


class Way:
    """A folder to work in, and a Hub to publish to."""

    def __init__(self, folder: Path, hub: HubStandIn):
        self.folder, self.hub = folder, hub
        self.environment = {**os.environ, **hub.environment(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
        self.environment["CASTREAM_CACHE"] = str(folder / "cache")

    def start(self, *command, folder: Path | None = None) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, command)], cwd=folder or self.folder, env=self.environment, **pipes)

    def run(self, *command) -> str:
        process = self.start(*command)
        said, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, f"{command}:\n{said}\n{errors}"
        return said

    def explain(self, model) -> list[str]:
        """The lines that tell a photo's classes."""
        lines = self.run(*CASTREAM, "explain", self.folder / "photo.jpg", "--model", model).splitlines()
        return [line for line in lines if "%" in line]


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    draw_photo(1, (300, 260)).save(folder / "photo.jpg")
    with HubStandIn() as hub:
        yield Way(folder, hub)


@pytest.fixture(scope="module")
def demo(way):
    """The folder of a demo on few scenes."""
    few = {"scenes_train": 64, "scenes_validation": 16, "epochs": 1, "batch_size": 16}
    words = [word for name, value in few.items() for word in (f"--{name}", value)]
    said = way.run(sys.executable, ROOT / "train.py", *words, "--output_dir", way.folder / "demo")
    assert "AutoModelForImageClassification.from_pretrained" in said
    return way.folder / "demo"


@pytest.fixture(scope="module")
def published(way, demo):
    """The demo's model, uploaded with its results and its Space; the Space's folder."""
    publish = [sys.executable, ROOT / "publish.py", "--model", demo / "model", "--repo-id", REPO]
    publish += ["--results", demo / "evaluation"]
    said = way.run(*publish, "--dry-run", way.folder / "dry")
    assert "largest difference 0.0e+00" in said and (way.folder / "dry" / "modeling_castream.py").is_file()
    way.run(*publish, "--space")
    space = way.folder / "space"
    for name, blob in way.hub.files(REPO, kind="space").items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(blob)
    return space


def test_the_demo_tells_its_table_and_its_picture(demo):
    results = json.loads((demo / "evaluation" / "results.json").read_text())
    assert results["sample"]["images"] == 16
    rows = [row for row in results["rows"] if row["method"] == "grad_cam" and not row["control"]]
    assert {row["pooling"] for row in rows} == {"gap", "ca"}
    assert all(0 < row["metrics"]["average_gain"]["mean"] < 100 for row in rows)
    assert Image.open(demo / "evaluation" / "examples.png").width > 500


def test_its_page_opens(way, demo):
    page = fetch_page(
        lambda port: way.start(sys.executable, ROOT / "app" / "app.py", "--model", demo / "model", "--port", port),
        "/config",
    )
    assert "Model: model." in page


def test_what_was_published_is_the_same_classifier(way, demo, published):
    classes = way.explain(demo / "model")
    assert len(classes) == 3 and way.explain(REPO) == classes and way.explain(way.folder / "dry") == classes
    card = way.hub.files(REPO)["README.md"].decode()
    assert "average_gain" in card and REPO in card


def test_the_space_runs_on_what_it_requires_alone(way, published):
    """In an environment that holds its requirements and Gradio, and neither castream nor anything else."""
    requirements = [Requirement(line) for line in (published / "requirements.txt").read_text().split()]
    assert all(requirement.specifier.contains(version(requirement.name).split("+")[0]) for requirement in requirements)
    readme = (published / "README.md").read_text()
    assert f"sdk_version: {version('gradio')}" in readme and "app_file: app.py" in readme
    python = _environment(way.folder / "space-env", [*(requirement.name for requirement in requirements), "gradio"])
    hidden = subprocess.run([python, "-c", "import castream"], capture_output=True, text=True, cwd=published)
    assert "No module named 'castream'" in hidden.stderr
    way.environment["GRADIO_SERVER_NAME"] = "127.0.0.1"
    page = fetch_page(lambda port: way.start(python, "app.py", "--port", port, folder=published), "/config")
    assert f"Model: {REPO}." in page


def _environment(folder: Path, names: list[str]) -> Path:
    """A Python that sees distributions of this one, with whatever they require, and nothing else."""
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for found in _closure(names).values():
        for top in {file.parts[0] for file in found.files if ".." not in file.parts} - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(found.locate_file(top)).resolve())
    return folder / "bin" / "python"


def _closure(names: list[str]) -> dict[str, Distribution]:
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = distribution(name)
        needed = [Requirement(text) for text in found[name].requires or ()]
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found
