"""The door for datasets: parquet, folders of images, tar shards; columns, classes and sizes; refusals in one line."""

import io
import json
import tarfile

import pytest
from castream.data.opening import open_split

from tests.training.tiny_data import CLASSES, make_row, write_shards


def open_folder(folder, split="train", **settings):
    return open_split(str(folder), split, **{"beside": ("train", "test")} | settings)


def refused(folder, split="train", **settings) -> str:
    with pytest.raises(ValueError) as error:
        open_folder(folder, split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_image(path, index=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_row(index)["image"]["bytes"])


def write_tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row in rows:
            for suffix, data in (("jpg", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                info = tarfile.TarInfo(f"{row['index']:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_parquet(tiny_dataset):
    split = open_folder(tiny_dataset)
    assert (split.image_column, split.label_column, split.class_names) == ("image", "label", CLASSES)
    assert (split.num_rows, split.stream.num_shards, split.multi_label) == (32, 4, False)
    assert open_folder(tiny_dataset, "validation").num_rows == 12


def test_resharding_by_row_groups(tiny_dataset):
    split = open_folder(tiny_dataset, reshard=True)
    assert split.stream.num_shards == 3 + 2 + 3 + 2 and split.num_rows == 32


def test_webdataset(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"train-{shard:04d}.tar", [make_row(index) for index in range(4 * shard, 4 * shard + 4)])
    split = open_folder(tmp_path)
    assert (split.image_column, split.label_column, split.stream.num_shards) == ("jpg", "cls", 3)
    assert split.num_rows == 12
    rows = list(split.stream)
    assert len(rows) == 12 and rows[5]["cls"] == 5 % 3 and rows[5]["jpg"]["bytes"]


def test_folders_of_classes(tmp_path):
    for index in range(6):
        write_image(tmp_path / "train" / CLASSES[index % 3] / f"{index}.jpg", index)
        write_image(tmp_path / "test" / CLASSES[index % 2] / f"{index}.jpg", index)
    split = open_folder(tmp_path)
    assert split.class_names == sorted(CLASSES) and split.num_rows == 6 and split.unsplittable


def test_several_labels_an_image_by_their_names(tmp_path):
    for index in range(3):
        write_image(tmp_path / "train" / f"{index}.jpg", index)
    lines = [{"file_name": f"{index}.jpg", "labels": CLASSES[: index + 1]} for index in range(3)]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = open_folder(tmp_path, class_names=CLASSES)
    assert split.multi_label and split.label_column == "labels"
    assert [split.class_ids(row, "key", 3) for row in split.stream] == [[0], [0, 1], [0, 1, 2]]
    with pytest.raises(ValueError, match="label 'green' of sample key is not a class"):
        open_folder(tmp_path, class_names=["red"]).class_ids({"labels": ["green"]}, "key", 1)


def test_unlabelled_training_and_labelled_test_images(tmp_path):
    for index in range(3):
        write_image(tmp_path / "train" / f"{index}.jpg", index)
        write_image(tmp_path / "test" / f"{index}.jpg", index)
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n0.jpg,2\n1.jpg,0\n2.jpg,1\n")
    assert open_folder(tmp_path).label_column is None
    split = open_folder(tmp_path, "test")
    assert [split.class_ids(row, "key") for row in split.stream] == [[2], [0], [1]]
    with pytest.raises(ValueError, match=r"this needs labels, and .* has none: all its photos lie in one folder"):
        open_folder(tmp_path).require_labels("this", "do that")


def test_classes_are_the_models_by_name(tmp_path):
    """A folder of two of the three classes numbers them otherwise than the model."""
    for index in range(6):
        write_image(tmp_path / "train" / CLASSES[index % 2] / f"{index}.jpg", index)
    split = open_folder(tmp_path).match_classes(dict(enumerate(CLASSES)))
    found = {CLASSES[split.class_ids(row, "key", 3)[0]] for row in split.stream if "red" in row["image"]["path"]}
    assert split.class_names == ["green", "red"] and found == {"red"}
    assert open_folder(tmp_path).match_classes({0: "n01", 1: "n02"}).to_model is None  # other names, as many
    with pytest.raises(ValueError, match=r"\(train\) has 2 classes \(green, \.\.\.\), and the model 3"):
        open_folder(tmp_path).match_classes(dict(enumerate("abc")))


def test_every_label_is_looked_at(tiny_dataset, tmp_path):
    split = open_folder(tiny_dataset)
    split.check_labels(3)
    with pytest.raises(ValueError, match=r"label 2 of sample train-00000.parquet:2 is outside 0\.\.1"):
        split.check_labels(2)
    for index in range(3):
        write_image(tmp_path / "test" / f"{index}.jpg", index)
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n0.jpg,2\n1.jpg,-1\n2.jpg,1\n")
    split = open_folder(tmp_path, "test")
    split.check_labels(3, may_lack=True)
    assert [row["label"] for row in split.examples()] == [[2], None, [1]]
    with pytest.raises(ValueError, match=r"label -1 of sample .*1\.jpg is none"):
        split.check_labels(3)


def test_a_splits_name_is_a_word_of_the_path(tmp_path):
    for name in ("latest-train", "test"):
        write_shards(tmp_path, name, [4])
    assert open_folder(tmp_path, "test").num_rows == 4


def test_refusals(tiny_dataset, tmp_path):
    assert "is no folder and no file" in refused(tmp_path / "nowhere")
    assert "no file below" in refused(tiny_dataset, "test")
    assert "image_column='picture' is not in " in refused(tiny_dataset, columns={"image": "picture"})
    assert "label_column='class' is not in " in refused(tiny_dataset, columns={"label": "class"})
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in refused(tmp_path / "empty")
    write_shards(tmp_path / "hollow", "train", [0])
    assert "has no rows" in refused(tmp_path / "hollow")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    assert "cannot be opened" in refused(tmp_path / "broken")
