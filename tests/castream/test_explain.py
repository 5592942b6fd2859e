"""`castream explain` and `explain_photos`: what is said, what is written, what is skipped."""

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from benchmarks.random_networks import TRANSFORMERS, write_random_source
from castream import explain_photos
from castream.command import app
from castream.contact_sheet import CELL, MARGIN, MOST_ROWS, ContactSheet
from castream.explain import SHEET, find_photos
from tests.castream.conftest import LABELS, draw_photo


def explain(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_files_folders_and_patterns_name_photos(photos, monkeypatch):
    (photos / "[v1]").mkdir()
    draw_photo(3).save(photos / "[v1]" / "a*b.png")
    everything = ["[v1]/a*b.png", "broken.jpg", "deeper/one.jpg", "one.png"]
    assert names(find_photos([photos]), photos) == everything
    assert names(find_photos([photos / "one.png", photos]), photos) == ["one.png", *everything[:-1]]
    assert names(find_photos([str(photos / "**" / "*.jpg")]), photos) == ["broken.jpg", "deeper/one.jpg"]
    assert names(find_photos([photos / "[v1]" / "a*b.png"]), photos) == ["[v1]/a*b.png"]
    assert names(find_photos([photos], leave_out=photos / "deeper"), photos) == [
        "[v1]/a*b.png",
        "broken.jpg",
        "one.png",
    ]
    monkeypatch.setenv("HOME", str(photos))
    assert names(find_photos(["~/one.png"]), photos) == ["one.png"]
    with pytest.raises(ValueError, match=r"no photo in .*\*\.tiff"):
        find_photos([str(photos / "*.tiff")])


def test_answers_are_the_pipelines(photos, model_dir):
    found = explain_photos(photos, str(model_dir), method=["grad_cam", "attention_cam"], pooling="gap", top_k=2)
    expected = pipeline("image-explanation", model=str(model_dir), trust_remote_code=True)(
        draw_photo(1), method=["grad_cam", "attention_cam"], pooling="gap", top_k=2
    )
    broken, turned, photo = found
    assert broken.error and not broken.answers and broken.path.name == "broken.jpg"
    assert turned.answers[0]["saliency"].shape == (90, 60)  # upright
    for ours, theirs in zip(photo.answers, expected, strict=True):
        assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
        assert ours["method"] == theirs["method"] and np.abs(ours["saliency"] - theirs["saliency"]).max() < 1e-5


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in ("pp_lcnet", "vit") else pytest.mark.slow) for one in TRANSFORMERS]
)
def test_a_classifier_that_was_never_converted(photos, tmp_path, family):
    source, _ = write_random_source(f"transformers:{family}", tmp_path / "source")
    result = explain(photos / "one.png", "--model", source, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "class " in result.output and list((tmp_path / "out").rglob("*.png"))


def test_the_command_prints_classes_and_writes_pictures(photos, model_dir, tmp_path):
    output = tmp_path / "out"
    result = explain(photos, "--model", model_dir, "--output", output, "--top-k", 2, "--pooling", "ca")
    assert result.exit_code == 0, result.output
    (_, turned, photo) = explain_photos(photos, str(model_dir), top_k=2, pooling="ca")
    for one in (turned, photo):
        lines = "\n".join(f"  {answer['score']:7.2%}  {answer['label']}" for answer in one.answers)
        assert f"{one.path}\n{lines}\n" in result.output
    assert (
        f"skipped {photos / 'broken.jpg'}: image cannot be decoded: it is in none of the formats that Pillow reads"
        in result.output
    )
    assert "1 of 3 photos could not be read" in result.output
    overlays = sorted(path.name for path in output.glob("*.jpg"))
    assert len(overlays) == 4 and len([name for name in overlays if name.endswith(".2.jpg")]) in (1, 2)
    best = photo.answers[0]
    written = {path.name: Image.open(path) for path in output.glob("*.jpg")}
    same = [one for one in written.values() if one.size == best["overlay"].size]
    differences = [np.abs(np.asarray(one, float) - np.asarray(best["overlay"], float)).mean() for one in same]
    assert min(differences) < 3  # JPEG's
    sheet = Image.open(output / SHEET)
    assert sheet.width == 3 * (CELL + MARGIN) + MARGIN
    again = explain(tmp_path, "--model", model_dir, "--output", output)
    assert "2 explained" in again.output  # what was written is no photo of the next run


def test_a_class_by_label_or_id(photos, model_dir, tmp_path):
    photo = photos / "one.png"
    result = explain(photo, "--model", model_dir, "--target", "a/b: c", "--target", "1", "--output", tmp_path / "out")
    assert result.exit_code == 0 and result.output.index("a/b: c") < result.output.index("dog")
    assert "tabby" not in result.output
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {
        "one.a-b-c.grad_cam.ca.jpg",
        "one.dog.grad_cam.ca.jpg",
    }


def test_exit_status_and_one_line(photos, model_dir, tmp_path):
    out = ("--output", tmp_path / "out")
    result = explain(photos / "broken.jpg", photos / "absent.png", "--model", model_dir, *out)
    assert result.exit_code == 1 and "absent.png: No such file" in result.output
    assert not (tmp_path / "out" / SHEET).exists()
    for arguments, said in (
        (("--method", "no_cam"), "method must be one or more of"),
        (("--target", "unicorn"), "unicorn"),
        (("--model", tmp_path / "nowhere" / "x"), "is no folder, and no model of the Hub"),
    ):
        result = explain(photos / "one.png", *out, "--model", model_dir, *arguments)
        assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1, result.output
    (tmp_path / "file").write_text("")
    result = explain(photos / "one.png", "--model", model_dir, "--output", tmp_path / "file")
    assert result.exit_code == 2 and "file" in result.output


def test_a_sheet_stays_small():
    photo = draw_photo(1, (500, 300))
    sheet = ContactSheet("a model", np.zeros((256, 3), np.uint8))
    for index in range(MOST_ROWS + 7):
        answer = {"overlay": photo, "score": 0.5, "label": LABELS[0] * 50, "method": "grad_cam", "pooling": "ca"}
        sheet.add(f"{index}.png", photo, [answer])
    picture = sheet.draw()
    assert len(sheet.rows) == MOST_ROWS and sheet.left_out == 7
    assert picture.width == 2 * (CELL + MARGIN) + MARGIN and picture.height < MOST_ROWS * 200
