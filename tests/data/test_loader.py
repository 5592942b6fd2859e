"""Reading: every row once, whatever the layout; the same rows in the same order after a resume; broken images."""

import itertools
import json

import numpy as np
import pytest
import torch
from castream.data.loader import ReaderSettings, StreamLoader
from castream.data.opening import open_split
from castream.data.sharding import ShardPlan
from castream.data.transforms import ImageTransform
from PIL import Image
from transformers import BitImageProcessor

from tests.training.tiny_data import encode, write_shards

PROCESSOR = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_loader(folder, world=1, rank=0, workers=1, in_process=True, split="train", **changes):
    opened = open_split(str(folder), split)
    settings = {"batch_size": 4, "shuffle_window": 6, "interleave": 2, "views": None, "num_labels": 3, "seed": 5}
    plan = ShardPlan(opened.stream.num_shards, world, workers, 5, by_rows=opened.unsplittable)
    transform = ImageTransform(PROCESSOR, "crop")
    return StreamLoader(opened, plan, rank, transform, ReaderSettings(**settings | changes), in_process)


def by_key(loader, epoch=0) -> dict[str, torch.Tensor]:
    batches = [batch for batch, _ in loader.epoch(epoch)]
    return {key: image for batch in batches for key, image in zip(batch["keys"], batch["images"], strict=True)}


def test_every_row_is_read_once_by_whoever(tiny_dataset):
    for world, workers, window, interleave in itertools.product((1, 2, 4), (1, 2), (0, 6, 1000), (1, 3)):
        keys = []
        for rank in range(world):
            loader = make_loader(tiny_dataset, world, rank, workers, shuffle_window=window, interleave=interleave)
            for worker in range(loader.num_readers):
                loader.reader.start(0, {}, worker)
                keys += [key for key, _, _ in loader.reader._shuffled(worker, None)]
        assert len(keys) == len(set(keys)) == 32


def test_batches_are_full_but_the_last(tiny_dataset):
    loader = make_loader(tiny_dataset, workers=3, in_process=False)
    sizes = [len(batch["keys"]) for batch, _ in loader.epoch(0)]
    assert sizes == [4] * 8
    assert loader.rows == 32


@pytest.mark.parametrize(("workers", "in_process", "stops"), [(1, True, range(1, 8)), (3, False, (1, 4, 6, 7))])
def test_resuming_gives_the_rest_to_the_last_bit(tiny_dataset, workers, in_process, stops):
    loader = make_loader(tiny_dataset, workers=workers, in_process=in_process)
    whole = list(loader.epoch(2))
    for stop in stops:
        state = json.loads(json.dumps(whole[stop - 1][1]))
        rest = list(make_loader(tiny_dataset, workers=workers, in_process=in_process).epoch(2, state))
        assert [batch["keys"] for batch, _ in rest] == [batch["keys"] for batch, _ in whole[stop:]]
        for (batch, after), (expected, expected_after) in zip(rest, whole[stop:], strict=True):
            assert torch.equal(batch["images"], expected["images"])
            assert torch.equal(batch["noise"], expected["noise"])
            assert after == expected_after


def test_order_changes_from_epoch_to_epoch_and_views_repeat(tiny_dataset):
    def images(epoch, views):
        return by_key(make_loader(tiny_dataset, views=views), epoch)

    first, second, third = (images(epoch, views=2) for epoch in range(3))
    assert list(first) != list(second)
    assert all(torch.equal(first[key], third[key]) for key in first)
    assert not all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], image) for key, image in images(2, views=None).items())


def test_a_sample_does_not_depend_on_its_reader(tiny_dataset):
    alone = by_key(make_loader(tiny_dataset))
    shared = [by_key(make_loader(tiny_dataset, world=2, rank=rank)) for rank in range(2)]
    assert all(torch.equal(alone[key], image) for images in shared for key, image in images.items())


def test_reading_leaves_the_random_state_of_the_process_alone(tiny_dataset):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    list(make_loader(tiny_dataset).epoch(0))
    assert torch.equal(torch.rand(3), expected)


def test_broken_images_are_skipped_and_listed(tmp_path):
    write_shards(tmp_path / "data", "train", [10, 10], broken=(3, 14))
    loader = make_loader(tmp_path / "data")
    keys = [key for batch, _ in loader.epoch(0) for key in batch["keys"]]
    assert len(keys) == 18
    names, reasons = zip(*(line.split("\t") for line in sorted(loader.bad)), strict=True)
    assert names == ("train-00000.parquet:3", "train-00001.parquet:4")
    assert all(" " in reason for reason in reasons)
    assert loader.rows == 20


def test_labels_out_of_range_are_refused(tiny_dataset):
    with pytest.raises(ValueError, match=r"label 2 of sample train-0000\d.parquet:\d+ is outside 0\.\.1"):
        list(make_loader(tiny_dataset, num_labels=2).epoch(0))


def test_a_vanished_shard_is_one_line(tmp_path):
    write_shards(tmp_path / "data", "train", [10, 10])
    loader = make_loader(tmp_path / "data")
    (tmp_path / "data" / "train-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"reading the dataset failed.*train-00001") as error:
        list(loader.epoch(0))
    assert "\n" not in str(error.value)


def test_folders_of_images_are_shared_out_by_rows(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(13):
        path = tmp_path / "photos" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8), "PNG"))
    keys = []
    for rank in range(2):
        loader = make_loader(tmp_path / "photos", world=2, rank=rank)
        assert loader.reader.split.num_rows == 13
        assert loader.reader.split.class_names == ["a", "b"]
        keys += [key for batch, _ in loader.epoch(0) for key in batch["keys"]]
    assert len(keys) == len(set(keys)) == 13


def test_unlabelled_photos_and_odd_formats(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    for mode, name in (("L", "grey.jpg"), ("CMYK", "cmyk.jpg"), ("RGBA", "alpha.png"), ("P", "palette.png")):
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:300])
    split = open_split(str(folder), "train")
    assert split.label_column is None and split.num_rows == 5
    plan = ShardPlan(1, 1, 1, by_rows=True)
    settings = ReaderSettings(4, 0, 1, None, 3, 0)
    loader = StreamLoader(split, plan, 0, ImageTransform(PROCESSOR, "none"), settings, in_process=True)
    (batch, _), *rest = loader.epoch(0)
    assert not rest and batch["images"].shape == (4, 3, 32, 32) and "labels" not in batch
    assert [line.split("\t")[0] for line in loader.bad] == [str(folder / "broken.jpg")]
