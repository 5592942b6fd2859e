"""Folders as people keep them: the evident thing is done and said, or the folder is refused with a way out."""

import io
import json
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from castream.data.decoding import read_image
from castream.data.opening import fingerprint, open_split
from PIL import Image


def photo(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (seed * 37 % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, *paths: str) -> Path:
    """Photos at these paths, and the folder."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(photo(number))
    return folder


def labels(split) -> dict[str, object]:
    """Class name, or id, of every photo by its file's name; checks that each can be decoded."""
    found = {}
    for row in split.stream:
        assert read_image(row[split.image_column]).shape == (3, 10, 12)
        name = Path(row[split.image_column]["path"].partition("::/")[0]).name
        if split.label_column is None:
            found[name] = None
        else:
            ids = split.class_ids(row, name)
            found[name] = split.class_names[ids[0]] if split.class_names else ids[0]
    return found


def refused(folder, split="train", **options) -> str:
    with pytest.raises(ValueError) as error:
        open_split(str(folder), split, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Splits are never classes


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "test"])
def test_unlabelled_splits_are_no_classes(tmp_path, name):
    write(tmp_path, "train/1.jpg", "train/2.jpg", f"{name}/3.jpg", f"{name}/4.jpg")
    for asked, names in (("train", ["1.jpg", "2.jpg"]), (name, ["3.jpg", "4.jpg"])):
        split = open_split(str(tmp_path), asked)
        assert labels(split) == dict.fromkeys(names) and split.label_column is None
        assert "all its photos lie in one folder" in split.notes[-1]


def test_splits_among_data_files_are_no_classes(tmp_path):
    write(tmp_path, "train/1.jpg", "validation/2.jpg", "test/3.jpg")
    split = open_split("imagefolder", "all", data_files=[f"{tmp_path}/**"])
    assert labels(split) == dict.fromkeys(["1.jpg", "2.jpg", "3.jpg"])
    write(tmp_path / "classes", "train/cat/1.jpg", "test/dog/2.jpg", "test/cat/3.jpg")
    split = open_split("imagefolder", "all", data_files=[f"{tmp_path}/classes/**"])
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "cat"}


@pytest.mark.parametrize("name", ["val", "valid", "dev", "val2017", "Val"])
def test_a_split_is_found_under_its_other_names_and_that_is_said(tmp_path, name):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", f"{name}/cat/3.jpg", f"{name}/dog/4.jpg")
    split = open_split(str(tmp_path), "validation")
    assert labels(split) == {"3.jpg": "cat", "4.jpg": "dog"}
    assert split.notes == (f"{tmp_path.name}: the split 'validation' is its folder {name}.",)


def test_two_folders_that_may_be_the_split_are_refused(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "dev/cat/4.jpg")
    assert "no split 'validation' but dev, val: name one of them" in refused(tmp_path, "validation")


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write(tmp_path / "split", "train/cat/1.jpg", "train/dog/2.jpg")
    assert "has no split 'test', only train" in refused(tmp_path / "split", "test")
    write(tmp_path / "whole", "cat/1.jpg", "dog/2.jpg")
    assert "only train, which is all of it" in refused(tmp_path / "whole", "validation")
    assert labels(open_split(str(tmp_path / "whole"), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_splits_inside_the_class_folders(tmp_path):
    write(tmp_path, "cat/train/1.jpg", "dog/train/2.jpg", "cat/test/3.jpg", "dog/test/4.jpg")
    assert labels(open_split(str(tmp_path), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert labels(open_split(str(tmp_path), "test")) == {"3.jpg": "cat", "4.jpg": "dog"}


def test_class_folders_beside_a_split_are_the_training_split(tmp_path):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", "heldout/cat/3.jpg", "heldout/dog/4.jpg")
    split = open_split(str(tmp_path), "train", beside=("heldout",))
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert split.notes == (f"{tmp_path.name}: 'train' is all but its folders heldout.",)


# Names that other libraries take for patterns


def test_odd_names_are_only_names(tmp_path):
    root = tmp_path / "photos [v1]"
    write(root, "train/__c/a::b.jpg", "train/d*/%20 #.jpg")
    assert labels(open_split(str(root), "train")) == {"a::b.jpg": "__c", "%20 #.jpg": "d*"}
    split = open_split("imagefolder", "train", data_files=[str(root / "train")])
    assert labels(split) == {"a::b.jpg": "__c", "%20 #.jpg": "d*"}


def test_links_to_folders_are_followed_and_dangling_ones_counted(tmp_path):
    write(tmp_path / "elsewhere", "cat/1.jpg", "dog/2.jpg")
    root = tmp_path / "photos"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "dog" / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    split = open_split(str(root), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert split.notes == ("photos: left out train/dog/3.jpg (a link that leads nowhere).",)


def test_hidden_files_are_no_photos(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/dog/._2.jpg", "__MACOSX/train/3.jpg", ".cache/4.jpg")
    assert labels(open_split(str(tmp_path), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "photos", "train/cat/1.jpg", "train/dog/2.jpg")
    for options in ({"name": "~/photos"}, {"name": "imagefolder", "data_files": ["~/photos/train/**"]}):
        assert labels(open_split(split="train", **options)) == {"1.jpg": "cat", "2.jpg": "dog"}


# A stray file does not decide what a folder is


def write_tar(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            data = photo(number) if name.endswith("jpg") else str(number % 2).encode()
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("stray", ["train.tar", "backup/old.tar", "train/originals.tar", "train/cat/table.parquet"])
def test_an_archive_beside_photos_is_left_out_and_named(tmp_path, stray):
    write(tmp_path, *(f"train/{'cat' if number % 2 else 'dog'}/{number}.jpg" for number in range(6)))
    write_tar(tmp_path / stray, "9.jpg")
    split = open_split(str(tmp_path), "train")
    assert (len(labels(split)), split.class_names) == (6, ["cat", "dog"])
    assert split.notes == (f"{tmp_path.name}: left out {stray} (no photo).",)


def test_a_preview_beside_shards_is_left_out_and_named(tmp_path):
    write(tmp_path, "preview.jpg")
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", "1.jpg", "1.cls", "2.jpg", "2.cls")
    split = open_split(str(tmp_path), "train")
    assert (split.num_rows, split.label_column, split.stream.num_shards) == (4, "cls", 2)
    assert split.notes == (f"{tmp_path.name}: left out preview.jpg (not a shard of its kind).",)


def test_as_many_photos_as_shards_are_refused(tmp_path):
    write(tmp_path, "train/1.jpg")
    write_tar(tmp_path / "train.tar", "1.jpg")
    assert "as many photos (train/1.jpg) as shards (train.tar)" in refused(tmp_path)


@pytest.mark.parametrize("place", ["results", "."])
def test_results_written_among_the_photos_are_no_data(tmp_path, place):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", f"{place}/examples.png", f"{place}/curves.png")
    (tmp_path / place / "evaluation.json").write_text("{}")
    pq.write_table(pa.table({"index": [0]}), tmp_path / place / "per_image.parquet")
    split = open_split(str(tmp_path), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"} and not split.notes


def test_shards_are_sorted_by_the_splits_in_their_names(tmp_path):
    for name in ("trainset-0.tar", "Train_1.tar", "valset-0.tar", "latest/val-1.tar"):
        write_tar(tmp_path / name, "1.jpg", "1.cls")
    for split in ("train", "validation"):
        names = [Path(path).name for path in open_split(str(tmp_path), split).files]
        assert names == {"train": ["Train_1.tar", "trainset-0.tar"], "validation": ["val-1.tar", "valset-0.tar"]}[split]
    assert "no file below" in refused(tmp_path, "test")


# Labels that vanish say why


def test_a_stray_photo_beside_class_folders_is_left_out(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/3.jpg")
    split = open_split(str(tmp_path), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert split.notes == (f"{tmp_path.name}: left out train/3.jpg (beside the class folders).",)


def test_photos_at_several_depths_belong_to_the_outer_class(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/dog/best/3.jpg")
    split = open_split(str(tmp_path), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "dog"}
    assert "several depths, such as train/dog/best/3.jpg; the classes are cat, dog" in split.notes[0]


def test_a_folder_around_the_class_folders_is_no_class(tmp_path):
    write(tmp_path, "train/images/cat/1.jpg", "train/images/dog/2.jpg")
    assert labels(open_split(str(tmp_path), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_mostly_loose_photos_have_no_labels(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg", "3.jpg", "rome/4.jpg", "paris/5.jpg")
    split = open_split(str(tmp_path), "train")
    assert len(labels(split)) == 5 and split.label_column is None
    assert split.notes[-1].endswith("has no labels: most of its photos, such as 1.jpg, lie in no class folder.")


def test_a_single_class_is_a_label_only_where_the_model_has_it(tmp_path):
    write(tmp_path, "test/dog/1.jpg", "test/dog/2.jpg")
    split = open_split(str(tmp_path), "test")
    assert split.label_column is None and "all its photos lie in one folder, dog" in split.notes[-1]
    assert [row["label"] for row in split.match_classes({0: "cat", 1: "dog"}).examples()] == [[1], [1]]
    assert [row["label"] for row in split.match_classes({0: "cat", 1: "bee"}).examples()] == [None, None]


def test_a_table_without_labels_leaves_them_to_the_folders(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,author\ncat/1.jpg,a\ndog/2.jpg,b\n")
    assert labels(open_split(str(tmp_path), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_a_table_of_masks_alone_is_the_reason(tmp_path):
    write(tmp_path, "test/1.jpg", "test/masks/1.png")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,mask_file_name\n1.jpg,masks/1.png\n")
    split = open_split(str(tmp_path), "test")
    assert split.has_masks and split.num_rows == 1 and split.unlabelled == "test/metadata.csv has no label column"


def test_a_table_in_the_root_is_for_all_splits(tmp_path):
    write(tmp_path, "train/1.jpg", "train/2.jpg", "test/3.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.jpg,cat\ntrain/2.jpg,dog\ntest/3.jpg,cat\n")
    assert labels(open_split(str(tmp_path), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert labels(open_split(str(tmp_path), "test")) == {"3.jpg": "cat"}


def test_what_a_table_does_not_name_and_what_it_names_in_vain_is_said(tmp_path):
    write(tmp_path, "train/1.jpg", "train/2.jpg", "train/3.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n1.jpg,cat\n2.jpg,dog\n4.jpg,dog\n5.jpg,cat\n")
    split = open_split(str(tmp_path), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert split.notes == (
        "metadata.csv: left out 4.jpg and 1 more (no such file).",
        f"{tmp_path.name}: left out train/3.jpg (not in train/metadata.csv).",
    )
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n6.jpg,cat\n")
    assert "none of the photos that" in refused(tmp_path) and "6.jpg" in refused(tmp_path)


def test_formats_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("castream.data.folders.readable_suffixes", lambda: (".jpg",))
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.HEIC", "train/dog/4.heic", "train/dog/5.avif")
    split = open_split(str(tmp_path), "train")
    assert labels(split) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert split.notes == (
        f"{tmp_path.name}: left out train/dog/3.HEIC and 1 more (pip install pillow-heif opens these).",
        f"{tmp_path.name}: left out train/dog/5.avif (a newer Pillow opens these).",
    )
    write(tmp_path / "phone", "1.heic")
    assert "photos that cannot be read here, such as 1.heic" in refused(tmp_path / "phone")


# One reader of tables

ROWS = [("1.jpg", "Käfer"), ("2.jpg", "Ameise"), ("3.jpg", "Käfer")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_all_spreadsheets(tmp_path, encoding, separator):
    write(tmp_path, "train/1.jpg", "train/2.jpg", "train/3.jpg")
    lines = [separator.join(row) for row in (("file_name", "label"), *ROWS)]
    (tmp_path / "train" / "metadata.csv").write_bytes("\r\n".join(lines).encode(encoding))
    split = open_split(str(tmp_path), "train")
    assert labels(split) == dict(ROWS) and split.class_names == ["Ameise", "Käfer"]


def test_a_blank_label_leaves_the_others_as_they_are(tmp_path):
    write(tmp_path, "train/1.jpg", "train/2.jpg", "train/3.jpg")
    for text in ("file_name,label\n1.jpg,2\n2.jpg,\n3.jpg,0\n", "file_name,label\n1.jpg,2.0\n2.jpg,\n3.jpg,0.0\n"):
        (tmp_path / "train" / "metadata.csv").write_text(text)
        split = open_split(str(tmp_path), "train", class_names=["a", "b", "c"])
        assert [row["label"] for row in split.examples()] == [[2], None, [0]]
        split.check_labels(3, may_lack=True)
        with pytest.raises(ValueError, match=r"label None of sample .*2\.jpg is none: leave that row out"):
            split.check_labels(3)


def test_composed_and_decomposed_names_are_equal(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{decomposed}.jpg", "train/2.jpg")
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,label\n{composed}.jpg,{decomposed}\n2.jpg,Ameise\n")
    split = open_split(str(tmp_path), "train").match_classes({0: composed, 1: "Ameise"})
    assert [row["label"] for row in split.examples()] == [[0], [1]]
    write(tmp_path / "folders", f"{decomposed}/1.jpg", f"{composed}/2.jpg", "Ameise/3.jpg")
    split = open_split(str(tmp_path / "folders"), "train")
    assert split.class_names == ["Ameise", composed] and len(labels(split)) == 3


def test_a_table_that_is_none_is_named(tmp_path):
    write(tmp_path, "train/1.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n1.jpg,a,b,c\n")
    assert "metadata.csv cannot be read as a table: row 2 has 4 fields, and the header 2" in refused(tmp_path)


# Single files, archives, addresses


def test_a_table_by_itself(tmp_path):
    write(tmp_path, "images/1.jpg", "images/2.jpg", "images/3.jpg")
    text = "path;label;split\nimages/1.jpg;cat;train\nimages/2.jpg;dog;train\nimages/3.jpg;dog;val\n"
    (tmp_path / "list.csv").write_text(text)
    assert labels(open_split(str(tmp_path / "list.csv"), "train")) == {"1.jpg": "cat", "2.jpg": "dog"}
    assert labels(open_split(str(tmp_path / "list.csv"), "validation")) == {"3.jpg": "dog"}
    assert "no rows of the split 'test'" in refused(tmp_path / "list.csv", "test")
    assert labels(open_split("csv", "train", data_files=[str(tmp_path / "list.csv")]))["1.jpg"] == "cat"


def test_a_single_parquet_file(tmp_path):
    image = pa.array([{"bytes": photo(number), "path": f"{number}.jpg"} for number in range(3)])
    pq.write_table(pa.table({"image": image, "classes": [0, 1, 0]}), tmp_path / "rows.parquet")
    split = open_split(str(tmp_path / "rows.parquet"), "train")
    assert (split.num_rows, list(labels(split).values())) == (3, [0, 1, 0])
    assert "names no split, so that all of it is 'train'" in refused(tmp_path / "rows.parquet", "test")


def test_zip_archives_and_addresses(tmp_path):
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, name in enumerate(("cat", "dog")):
            archive.writestr(f"photos/train/{name}/{number}.jpg", photo(number))
            memory.pipe(f"/folders/train/{name}/{number}.jpg", photo(number))
    memory.pipe("/folders.zip", (tmp_path / "photos.zip").read_bytes())
    for name in (tmp_path / "photos.zip", "memory://folders", "memory://folders.zip"):
        split = open_split(str(name), "train")
        assert split.class_names == ["cat", "dog"] and split.num_rows == 2
        for row, expected in zip(split.examples(), ([0], [1]), strict=True):
            assert row["label"] == expected and read_image(row["image"]).shape == (3, 10, 12)


@pytest.mark.parametrize("name", ["nowhere/photos", "./nowhere", "nowhere.parquet", "imagefolder", "memory://nowhere"])
def test_what_is_not_there_is_one_line(name, monkeypatch):
    for settings in (datasets.config, huggingface_hub.constants):  # read from the environment when imported
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert name in refused(name)


def test_archives_only(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"")
    assert "archives only, such as train.zip: unpack them" in refused(tmp_path)


# Truth beside labels


def test_masks_and_boxes(tmp_path):
    write(tmp_path, "test/1.jpg", "test/2.jpg", "test/masks/1.png")
    boxes = [[1, 2, 5, 6], [0, 0, 3.5, 4]]
    rows = [
        {"file_name": "1.jpg", "label": 3, "mask_file_name": "masks/1.png", "boxes": boxes},
        {"file_name": "2.jpg", "label": 4, "mask_file_name": None, "boxes": json.dumps(boxes)},
    ]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = open_split(str(tmp_path), "test")
    first, second = split.examples()
    assert split.has_masks and not split.notes
    assert read_image(first["mask"]).shape == (3, 10, 12) and second["mask"] is None
    assert first["boxes"] == second["boxes"] == boxes
    assert (first["id"], first["label"], second["label"]) == ("1.jpg", [3], [4])


# Old figures for new data


def test_a_fingerprint_tells_new_labels_and_new_photos(tmp_path):
    def current():
        return fingerprint(open_split(str(tmp_path), "train"))

    write(tmp_path, "train/1.jpg", "train/2.jpg")
    table = tmp_path / "train" / "metadata.csv"
    table.write_text("file_name,label\n1.jpg,0\n2.jpg,1\n")
    before = current()
    assert current() == before and len(before) == 16
    table.write_text("file_name,label\n1.jpg,1\n2.jpg,1\n")
    assert current() != before
    table.write_text("file_name,label\n1.jpg,0\n2.jpg,1\n")
    assert current() == before
    status = (tmp_path / "train" / "1.jpg").stat()
    (tmp_path / "train" / "1.jpg").write_bytes(photo(9))
    os.utime(tmp_path / "train" / "1.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert current() != before
