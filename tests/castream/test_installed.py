"""The wheel in an environment of its own, far from any checkout: every room is there and does its job."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.castream.conftest import draw_photo
from tests.fresh_process import fetch_page

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "outputs", ".venv")


class Installed:
    """A folder outside of the checkout, with the installed commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            **{"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "CASTREAM_CACHE": str(folder / "cache")},
        }

    def start(self, *arguments) -> subprocess.Popen:
        command = [str(self.folder / "venv" / "bin" / "castream"), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def run(self, *arguments) -> str:
        process = self.start(*arguments)
        said, errors = process.communicate(timeout=500)
        assert process.returncode == 0, f"{arguments}:\n{said}\n{errors}"
        return said


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, installed beside the packages of this environment, whose own castream stays out of sight."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", str(folder / "source"), *offline, "-w", str(folder)], check=True)
    shutil.rmtree(folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (wheel,) = folder.glob("castream-*.whl")
    install = ["--python", str(folder / "venv" / "bin" / "python"), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, *install, str(wheel)], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "environment.pth").write_text("\n".join(paths))  # whose own .pth files are not read: no editable install
    photos = folder / "photos" / "test"
    photos.mkdir(parents=True)
    for seed in range(4):
        draw_photo(seed, (300, 260)).save(photos / f"{seed}.jpg")
    (photos / "metadata.csv").write_text("file_name,label\n" + "".join(f"{seed}.jpg,{seed}\n" for seed in range(4)))
    return Installed(folder)


@pytest.fixture(scope="module")
def model(installed):
    installed.run("convert", "--source", "pypi:efficientnet-lite0", "--output", "lite0")
    return "lite0"


def test_it_is_the_wheel_that_runs(installed):
    code = "import castream, modeling_castream, castream.training; print(castream.__file__, modeling_castream.__file__)"
    python = installed.folder / "venv" / "bin" / "python"
    said = subprocess.check_output([python, "-c", code], cwd=installed.folder, env=installed.environment, text=True)
    assert all(path.startswith(str(installed.folder / "venv")) for path in said.split())


def test_explain(installed):
    said = installed.run("explain", "photos/test/1.jpg", "--top-k", 2)
    assert said.startswith("photos/test/1.jpg\n") and said.count("%") == 2
    assert Image.open(installed.folder / "explained" / "contact_sheet.png").width == 3 * 250 + 10
    assert len(list((installed.folder / "explained").glob("*.jpg"))) == 2


def test_evaluate_and_publish(installed, model):
    arguments = ["--model", model, "--dataset", "photos", "--split", "test", "--methods", "grad_cam"]
    metrics = ["--metrics", "average_drop", "average_gain", "--output", "results"]
    installed.run("evaluate", *arguments, *metrics)
    assert "grad_cam" in (installed.folder / "results" / "results.md").read_text()
    said = installed.run(
        "publish", "--model", model, "--repo-id", "me/lite0", "--results", "results", "--space", "--dry-run"
    )
    assert "Loaded in a fresh process without castream; largest difference 0.0e+00." in said
    folders = {"lite0-publication": "modeling_castream.py", "lite0-publication-space": "page.css"}
    assert all((installed.folder / folder / file).is_file() for folder, file in folders.items())
    photo = "photos/test/1.jpg"
    again = [
        installed.run("explain", photo, "--model", source).splitlines()[1:4] for source in (model, "lite0-publication")
    ]
    assert again[0] == again[1]  # what was published comes back as the same classifier


def test_train_knows_its_recipes(installed):
    assert "--objective" in installed.run("train", "--help")


def test_app(installed, model):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'castream[app]'")
    assert "gradio" in fetch_page(lambda port: installed.start("app", "--model", model, "--port", port))
