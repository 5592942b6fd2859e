"""Converted classifiers of every family, each made once a session."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from castream.conversion.classifier import load_source, write_classifier
from castream.conversion.parity import Parity

from benchmarks.random_networks import write_random_source


@dataclass
class Converted:
    """A source, loaded anew by each test that asks, and the folder it was converted to."""

    source: str
    checkpoint: str | None
    folder: Path
    parity: Parity


@pytest.fixture(scope="session")
def convert_row(tmp_path_factory):
    """A function from a row of `random_networks.ROWS` to its `Converted`."""
    made = {}

    def convert_row(row: str) -> Converted:
        if row not in made:
            root = tmp_path_factory.mktemp("row")
            source, checkpoint = write_random_source(row, root / "source")
            parity = write_classifier(load_source(source, checkpoint), root / "converted")
            made[row] = Converted(source, checkpoint, root / "converted", parity)
        return made[row]

    return convert_row


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """Folder with ImageNet photos and their metadata.csv; a test that asks for it is skipped without one."""
    default = Path(__file__).resolve().parents[3] / "shared" / "imagenet-sample"
    folder = Path(os.environ.get("CASTREAM_IMAGENET_SAMPLE", default))
    if not (folder / "metadata.csv").is_file():
        pytest.skip("no ImageNet sample: name its folder in CASTREAM_IMAGENET_SAMPLE")
    return folder
