"""Training and evaluation, as commands, on folders as people keep them: opened alike, or refused alike in one line."""

import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from castream.evaluation.command import main as evaluate
from castream.training.arguments import TrainingArguments
from castream.training.run import main as train

from tests.data.test_folders import write_tar
from tests.training.tiny_data import CLASSES, make_row

pytestmark = pytest.mark.filterwarnings("ignore")


def write(folder: Path, *paths: str) -> None:
    """Photos at these paths; the number in a file's name says what is in it."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        number = int(Path(path).stem[-1]) if Path(path).stem[-1].isdigit() else 0
        (folder / path).write_bytes(make_row(number)["image"]["bytes"])


def splits_under_other_names(root: Path) -> None:
    write(root, *(f"{split}/{CLASSES[number % 3]}/{number}.jpg" for split in ("train", "val") for number in range(6)))


def stray_files(root: Path) -> None:
    splits_under_other_names(root)
    write(root, "train/7.jpg", "train/red/best/8.jpg", "results/examples.png")
    (root / "results" / "evaluation.json").write_text("{}")
    (root / "train" / "green" / "9.jpg").symlink_to(root / "gone.jpg")
    write_tar(root / "train" / "originals.tar", "1.jpg")


def tables(root: Path) -> None:
    write(root, *(f"{split}/{number}.jpg" for split in ("train", "val") for number in range(6)))
    for split in ("train", "val"):
        rows = [
            ("file_name", "label"),
            *((f"{number}.jpg", CLASSES[number % 3]) for number in range(6)),
            ("9.jpg", "red"),
        ]
        text = "\n".join(map(";".join, rows))
        (root / split / "metadata.csv").write_bytes(text.encode("utf-16"))


def odd_names(root: Path) -> None:
    splits_under_other_names(root)
    (root / "val").rename(root / "elsewhere")
    (root / "val").symlink_to(root / "elsewhere")
    (root / "train" / "red" / "0.jpg").rename(root / "train" / "red" / "a::b [1].jpg")


def archive(root: Path) -> None:
    splits_under_other_names(root / "inside")
    with zipfile.ZipFile(root / "photos.zip", "w") as packed:
        for path in sorted((root / "inside").rglob("*.jpg")):
            packed.write(path, path.relative_to(root))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (splits_under_other_names, "photos"),
        (stray_files, "photos"),
        (tables, "photos"),
        (odd_names, "photos [v1]"),
        (archive, "photos/photos.zip"),
    ],
)
def test_both_commands_take_the_folder(make, name, options, tiny_model, tmp_path, fresh_process_state):
    root = tmp_path / name
    make(root.parent if root.suffix else root)
    settings = {
        "dataset_name": str(root),
        "validation_split": "validation",
        "epochs": 1,
        "evaluation_methods": ["grad_cam"],
    }
    train(TrainingArguments(**options | settings))
    results = json.loads((Path(options["output_dir"]) / "evaluation" / "results.json").read_text())
    assert (results["sample"]["images"], results["sample"].get("skipped")) == (6, [])

    output = tmp_path / "evaluated"
    data = ["--dataset", str(root), "--split", "validation", "--output", str(output), "--metrics", "average_drop"]
    assert evaluate(["--model", str(tiny_model), *data, "--methods", "grad_cam"]) == 0
    table = pq.read_table(output / "per_image.parquet").to_pylist()
    assert {row["id"]: row["target"] for row in table} == {f"{number}.jpg": number % 3 for number in range(6)}


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["train/red/0.jpg", "train/blue/1.jpg", "val/red/2.jpg", "val/grey/3.jpg"], "grey is not one of the model's"),
        (["train/red/0.jpg", "train/blue/1.jpg", "val/red/2.jpg", "dev/red/3.jpg"], "but dev, val: name one of them"),
        (["red/0.jpg", "blue/1.jpg"], "no split 'validation', only train"),
    ],
)
def test_both_commands_refuse_the_folder(paths, said, options, tiny_model, tmp_path, fresh_process_state, capsys):
    root = tmp_path / "photos"
    write(root, *paths)
    settings = {"dataset_name": str(root), "validation_split": "validation", "classifier": "keep"}
    with pytest.raises(ValueError) as error:
        train(TrainingArguments(**options | settings))
    assert said in str(error.value) and "\n" not in str(error.value)
    data = ["--dataset", str(root), "--split", "validation", "--output", str(tmp_path / "evaluated")]
    assert evaluate(["--model", str(tiny_model), *data]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_mended_labels_are_not_given_the_old_figures(tiny_model, tmp_path, capsys):
    root, output = tmp_path / "photos", tmp_path / "evaluated"
    tables(root)
    data = ["--dataset", str(root), "--split", "validation", "--output", str(output), "--metrics", "average_drop"]
    command = ["--model", str(tiny_model), *data, "--methods", "grad_cam"]
    assert evaluate(command) == 0 and evaluate(command) == 0
    table = root / "val" / "metadata.csv"
    table.write_bytes(table.read_bytes().replace("red".encode("utf-16-le"), "blue".encode("utf-16-le")))
    assert evaluate(command) == 1
    assert "dataset_files" in capsys.readouterr().err.splitlines()[-1]
