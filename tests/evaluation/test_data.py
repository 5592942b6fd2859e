import io
import json
import tarfile

import numpy as np
import pytest
import torch
from castream.data.decoding import open_image
from castream.data.opening import open_split
from castream.data.split import count_rows
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.data import (
    Examples,
    Preprocessor,
    prepare_block,
    read_blocks,
    read_examples,
)
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.evaluation.small import MEAN, SIZE, STD, small_examples, small_image, small_model, small_processor


def jpeg(seed):
    buffer = io.BytesIO()
    small_image(seed).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_imagefolder(folder, names=("bee", "ant"), each=2):
    for number, name in enumerate(names):
        (folder / "test" / name).mkdir(parents=True)
        for index in range(each):
            (folder / "test" / name / f"{index}.jpg").write_bytes(jpeg(10 * number + index))


def open_dataset(name, split, data_files=None, columns=None, label2id=None):
    id2label = label2id and {index: name for name, index in label2id.items()}
    return read_examples(open_split(name, split, data_files=data_files, columns=columns), id2label=id2label)


def labels_of(examples):
    return [row["label"][0] for row in examples]


def test_imagefolder_with_the_models_order_of_classes(tmp_path):
    write_imagefolder(tmp_path)
    examples = open_dataset(str(tmp_path), "test")
    assert labels_of(examples) == [0, 0, 1, 1]  # the dataset's: ant, bee
    examples = open_dataset(str(tmp_path), "test", label2id={"bee": 0, "ant": 1, "cat": 2})
    assert labels_of(examples) == [1, 1, 0, 0]
    assert labels_of(examples) == [1, 1, 0, 0]  # a second pass


def test_any_folder_of_a_folder_is_a_split(tmp_path):
    """`datasets` knows train, validation and test; without one of them it takes everything for train."""
    write_imagefolder(tmp_path)
    write_imagefolder(tmp_path / "other")
    (tmp_path / "other" / "test").rename(tmp_path / "heldout")
    (tmp_path / "heldout" / "ant" / "0.jpg").unlink()
    examples = open_dataset(str(tmp_path), "heldout")
    assert (examples.total, labels_of(examples)) == (3, [0, 1, 1])
    assert open_dataset(str(tmp_path), "test").total == 4
    with pytest.raises(ValueError, match="has no split 'held', only "):
        open_dataset(str(tmp_path), "held")


def test_parquet_with_its_size(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "index": Value("int64")})
    rows = {"image": [small_image(seed) for seed in range(3)], "label": [0, 1, 0], "index": [7, 8, 9]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    examples = open_dataset("parquet", "train", data_files=[str(tmp_path / "rows.parquet")])
    rows = list(examples)
    assert [row["id"] for row in rows] == [7, 8, 9]
    assert open_image(rows[0]["image"]).size == (80, 72)


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for index in range(3):
            for name, content in ((f"{index}.jpg", jpeg(index)), (f"{index}.cls", str(index).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    examples = list(open_dataset("webdataset", "train", data_files=[str(tmp_path / "shard.tar")]))
    assert [row["label"][0] for row in examples] == [0, 1, 2]
    assert open_image(examples[2]["image"]).size == (80, 72)


def write_shard(path, count=3):
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            for name, content in ((f"{index}.jpg", jpeg(index)), (f"{index}.cls", str(index).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_parquet(path, count=3):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [small_image(seed) for seed in range(count)], "label": [seed % 2 for seed in range(count)]}
    Dataset.from_dict(rows, features=features).to_parquet(path)


def test_the_size_of_local_data_is_known_before_it_is_read(tmp_path):
    """So that the progress bar can tell the time left."""
    write_imagefolder(tmp_path / "images", each=3)
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar")
        write_parquet(tmp_path / f"{number}.parquet", count=4)
    assert open_dataset(str(tmp_path / "images"), "test").total == 6
    assert open_dataset("webdataset", "train", [f"{tmp_path}/*.tar"]).total == 6
    assert open_dataset("parquet", "train", [f"{tmp_path}/*.parquet"]).total == 8


def test_a_size_that_cannot_be_read_is_unknown(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    assert count_rows((str(tmp_path / "broken.parquet"),)) is None


def test_a_damaged_shard_is_one_clear_line(tmp_path):
    write_shard(tmp_path / "0.tar", count=20)
    whole = (tmp_path / "0.tar").read_bytes()
    examples = open_dataset("webdataset", "train", [f"{tmp_path}/0.tar"])
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0.tar \(train\) cannot be read beyond row \d+: \w+: .+") as caught:
        list(examples)
    assert "\n" not in str(caught.value)


def named_classes(names):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [small_image(0)], "label": [1]}, features=features)


def test_classes_that_are_none_of_the_models_are_no_labels():
    examples = read_examples(named_classes(["holiday", "garden"]), "d", {0: "ant", 1: "bee"})
    assert [row["label"] for row in examples] == [None] and "label" not in examples.columns
    assert examples.note == (
        "d has 2 classes (holiday, ...), and the model 2 (ant, ...), and none is called alike: give them the same "
        "names."
    )


def test_labels_by_name(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.jpg").write_bytes(jpeg(index))
    lines = [json.dumps({"file_name": f"{index}.jpg", "label": name}) for index, name in enumerate(("bee", "ant"))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples = open_dataset(
        "imagefolder", "test", data_files=[f"{folder}/*"], label2id={"ant": 4, "bee": 2, "a": 0, "b": 1, "c": 3}
    )
    assert labels_of(examples) == [2, 4]
    with pytest.raises(ValueError, match=r"but bee is not one of the model's"):
        list(open_dataset("imagefolder", "test", data_files=[f"{folder}/*"], label2id={"ant": 1, "cat": 0}))


def test_map_style_dataset_is_read_undecoded():
    features = Features({"img": ImageFeature(), "fine_label": Value("int64")})
    dataset = Dataset.from_dict({"img": [small_image(0)], "fine_label": [3]}, features=features)
    examples = read_examples(dataset)
    assert examples.total == 1
    (row,) = examples
    assert set(row["image"]) == {"bytes", "path"} and row["label"] == [3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"image": "picture"}, "image_column='picture' is not in "), ({"label": "y"}, "label_column='y' is not")],
)
def test_unknown_columns(tmp_path, columns, message):
    write_imagefolder(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_dataset(str(tmp_path), "test", columns=columns)


@pytest.mark.parametrize(("name", "split"), [("no/such-folder", "test"), ("", "validation")])
def test_unknown_dataset_or_split(tmp_path, name, split, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_imagefolder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be opened: .+|has no split 'validation', only test") as caught:
        open_dataset(str(tmp_path / name), split)
    assert "\n" not in str(caught.value)


def test_images_of_all_kinds_become_rgb():
    rgba = Image.new("RGBA", (6, 4), (255, 0, 0, 128))
    sixteen = np.full((4, 6), 300, np.uint16)
    for value in (rgba, rgba.convert("CMYK"), rgba.convert("P"), rgba.convert("L"), sixteen):
        assert open_image(value).mode == "RGB"
        assert open_image(value).size == (6, 4)


def test_exif_orientation_is_followed():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    small_image(0, (80, 40)).save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == (40, 80)


@pytest.mark.parametrize(
    "broken", [b"no image", jpeg(0)[: len(jpeg(0)) // 2], b"", {"bytes": None, "path": "/gone.jpg"}]
)
def test_undecodable_images_raise_one_kind_of_error(broken):
    with pytest.raises(OSError):
        open_image(broken)


def test_pixel_space_is_measured_from_the_processor():
    preprocessor = Preprocessor(small_processor())
    np.testing.assert_allclose(preprocessor.mean, MEAN, atol=1e-6)
    np.testing.assert_allclose(preprocessor.std, STD, atol=1e-6)
    images = preprocessor.to_pixel_space(preprocessor.normalized([small_image(0)]))
    expected = np.asarray(small_image(0, (80, 72)).resize((71, 64), Image.Resampling.BICUBIC), np.float32) / 255
    assert images.shape == (1, 3, SIZE, SIZE)
    np.testing.assert_allclose(images[0].permute(1, 2, 0), expected[:, 4 : 4 + SIZE], atol=1e-5)


def test_masks_go_the_way_of_their_images():
    """An image that is its own mask still is one after resizing and cropping."""
    mask = np.zeros((72, 80), bool)
    mask[5:30, 8:33] = True  # off the centre in both directions, so that a swap of axes shows
    row = {"index": 0, "image": Image.fromarray((mask * 255).astype(np.uint8)), "mask": mask, "label": 0}
    block = prepare_block(0, [row], Preprocessor(small_processor()), num_labels=5)
    assert torch.equal(block.masks[0], block.images[0].mean(0) > 0.5)


def test_mask_of_another_size_is_refused():
    row = small_examples(1)[0] | {"index": 0, "mask": np.ones((5, 6), bool)}
    with pytest.raises(ValueError, match="image 'image-0' has a mask of 6x5 for an image of 80x72"):
        prepare_block(0, [row], Preprocessor(small_processor()), num_labels=5)


def test_blocks_hold_the_same_rows_in_every_run():
    examples = read_examples([{"image": None}] * 7)
    blocks = [(number, [row["index"] for row in rows]) for number, rows in read_blocks(examples, 3, None)]
    assert blocks == [(0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6])]
    blocks = [(number, [row["index"] for row in rows]) for number, rows in read_blocks(examples, 3, 4)]
    assert blocks == [(0, [0, 1, 2]), (1, [3])]


def evaluate(examples, **settings):
    settings = EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",), poolings=("gap",), **settings)
    return evaluate_saliency(small_model(), small_processor(), examples, settings)


def test_unreadable_images_are_skipped_counted_and_listed():
    examples = small_examples(100)
    examples[3]["image"] = b"no image"
    report = evaluate(examples)
    sample = report.results["sample"]
    assert sample["images"] == 99
    assert [(entry["index"], entry["id"]) for entry in sample["skipped"]] == [(3, "image-3")]
    assert "1 image could not be decoded and was skipped: image-3." in report.markdown()
    assert 3 not in set(report.per_image["index"])


@pytest.mark.parametrize("known", [True, False])
def test_more_than_one_percent_unreadable_stops_the_run(known):
    examples = small_examples(150)
    examples[3]["image"] = examples[5]["image"] = b"no image"
    source = examples if known else Examples(iter(examples), "stream")
    with pytest.raises(ValueError, match=r"2 of 1\d\d images cannot be decoded, such as image-5 .* more than 1 %"):
        evaluate(source, batch_size=16)


def test_no_image_at_all():
    with pytest.raises(ValueError, match="holds no image"):
        evaluate([])


@pytest.mark.parametrize(
    "label", [[0, 1, 0, 1, 0], [0.0, 1.0, 1.0, 0.0, 0.0], 1.5, "bee", [2, 2], {"id": 3}, np.array([0, 1, 1])]
)
def test_a_label_that_is_no_class_id_is_refused(label):
    """Zeros and ones of all classes would otherwise pass for ids 0 and 1."""
    examples = small_examples(2)
    examples[1]["label"] = label
    with pytest.raises(ValueError, match=r"label .* of sample image-1 .*: give (a class id|class ids)"):
        evaluate(examples)


@pytest.mark.parametrize(
    ("label", "target"),
    [(np.int64(3), [3]), ("3", [3]), (torch.tensor([2, 4]), [2, 4]), ([1, -1, -1], [1]), (3.0, [3])],
)
def test_labels_of_all_kinds(label, target):
    report = evaluate([small_examples(1)[0] | {"label": label}])
    assert report.per_image["target"].tolist() == target


def test_a_row_without_an_image_is_named():
    with pytest.raises(ValueError, match="example 0 has no 'image' but img, index"):
        evaluate([{"img": small_image(0)}])


def test_rows_may_have_an_index_of_their_own():
    report = evaluate([example | {"index": 77} for example in small_examples(3)])
    assert report.per_image["index"].tolist() == [0, 1, 2]


def test_metrics_of_masks_need_a_mask_column():
    features = Features({"image": ImageFeature()})
    dataset = Dataset.from_dict({"image": [small_image(0)]}, features=features)
    settings = EvaluationSettings(metrics=("pointing_game", "mask_share"))
    with pytest.raises(ValueError, match="has no mask column, which mask_share, pointing_game need"):
        evaluate_saliency(small_model(), small_processor(), dataset, settings)


def test_boxes_stand_in_for_a_mask():
    """They go the way of their image as the mask of the same pixels does; a mask comes first; no box is no object."""
    mask = np.zeros((72, 80), bool)
    mask[5:30, 8:33], mask[40:60, 50:70] = True, True
    row = small_examples(1)[0] | {"index": 0}
    masked, boxes = row | {"mask": mask}, [[8, 5, 33, 30], [50, 40, 70, 60]]
    rows = [masked, row | {"mask": None, "boxes": boxes}, masked | {"boxes": [[0, 0, 1, 1]]}]
    masks = prepare_block(0, rows, Preprocessor(small_processor()), 5).masks
    assert masks[0].any() and torch.equal(masks[1], masks[0]) and torch.equal(masks[2], masks[0])
    without = prepare_block(0, [row | {"mask": None, "boxes": []}], Preprocessor(small_processor()), 5)
    assert without.masks == [None]


def test_boxes_are_looked_at_only_where_a_metric_needs_them():
    examples = [row | {"mask": None, "boxes": [[40, 40, 10, 10]]} for row in small_examples(3)]
    settings = {"methods": ("grad_cam",), "poolings": ("gap",)}
    evaluate_saliency(
        small_model(), small_processor(), examples, EvaluationSettings(metrics=("average_drop",), **settings)
    )
    wanted = EvaluationSettings(metrics=("pointing_game",), **settings)
    with pytest.raises(ValueError, match=r"image 'image-0' has a wrong box: boxes holds \[\[40.0, 40.0, 10.0, 10.0"):
        evaluate_saliency(small_model(), small_processor(), examples, wanted)
