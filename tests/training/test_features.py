"""Cached features are the backbone's, whoever wrote them, and an interrupted cache goes on."""

import pytest
import torch
from castream.training.features import CachedLoader, build_cache, prepare_cache
from tests.data.test_loader import make_loader

from tests.training.test_objectives import make
from tests.training.tiny_data import write_shards


def build(folder, objective, data, world=1, views=1, stop_after=None, key="a", limit=1e9):
    prepare_cache(folder, {"key": key})
    for rank in range(world):
        seen = 0

        def on_batch(images):
            nonlocal seen
            seen += images
            if stop_after is not None and seen > stop_after:
                raise KeyboardInterrupt

        loader = make_loader(data, world=world, rank=rank, views=views)
        options = {"views": views, "rank": rank, "limit_bytes": limit, "num_rows": 32}
        build_cache(folder, objective, loader, **options, on_batch=on_batch)


@pytest.fixture
def objective(tiny_model):
    return make(tiny_model, objective="masked_distill").float()


def test_features_are_the_backbones(tmp_path, tiny_dataset, objective):
    build(tmp_path / "cache", objective, tiny_dataset, views=2)
    cached = CachedLoader(tmp_path / "cache", 2, 0, 1, 32, seed=0)
    assert len(cached) == 32
    for view in range(2):
        (batch, _), *_ = cached.epoch(view)
        for direct, _ in make_loader(tiny_dataset, views=2).epoch(view):
            rows = [batch["keys"].index(key) for key in direct["keys"]]
            assert torch.equal(batch["labels"][rows], direct["labels"])
            for kind, (maps, _) in objective.extract(direct).items():
                for stored, computed in zip(batch["features"][kind][0], maps, strict=True):
                    torch.testing.assert_close(stored[rows], computed, rtol=1e-3, atol=1e-3)  # float16


def test_the_order_does_not_depend_on_the_number_of_processes(tmp_path, tiny_dataset, objective):
    build(tmp_path / "one", objective, tiny_dataset)
    build(tmp_path / "two", objective, tiny_dataset, world=2)
    one = [batch["keys"] for batch, _ in CachedLoader(tmp_path / "one", 1, 0, 1, 8, seed=4).epoch(3)]
    two = [
        [batch["keys"] for batch, _ in CachedLoader(tmp_path / "two", 1, rank, 2, 4, seed=4).epoch(3)]
        for rank in (0, 1)
    ]
    assert one == [first + second for first, second in zip(*two, strict=True)]


def test_an_interrupted_cache_goes_on(tmp_path, tiny_dataset, objective, monkeypatch):
    monkeypatch.setattr("castream.training.features.IMAGES_PER_FILE", 8)
    build(tmp_path / "whole", objective, tiny_dataset)
    for stop in (5, 20):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", objective, tiny_dataset, stop_after=stop)
    build(tmp_path / "cut", objective, tiny_dataset)
    whole, cut = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("whole", "cut")
    )
    assert whole == cut and len(whole) == 5


def test_features_of_other_settings_are_made_anew(tmp_path, tiny_dataset, objective):
    build(tmp_path / "cache", objective, tiny_dataset, world=2)
    build(tmp_path / "cache", objective, tiny_dataset, world=1, key="b")
    assert len(CachedLoader(tmp_path / "cache", 1, 0, 1, 8, seed=0)) == 32


def test_resuming_an_epoch(tmp_path, tiny_dataset, objective):
    build(tmp_path / "cache", objective, tiny_dataset)
    cached = CachedLoader(tmp_path / "cache", 1, 0, 1, 5, seed=0)
    whole = list(cached.epoch(1))
    assert [len(batch["keys"]) for batch, _ in whole] == [5, 5, 5, 5, 5, 5, 2]
    rest = list(cached.epoch(1, whole[3][1]))
    assert [batch["keys"] for batch, _ in rest] == [batch["keys"] for batch, _ in whole[4:]]


def test_the_size_is_refused_before_the_work(tmp_path, tiny_dataset, objective):
    with pytest.raises(ValueError, match=r"cache_features needs about .* more than cache_limit_gib="):
        build(tmp_path / "cache", objective, tiny_dataset, limit=1000)


def test_broken_images_are_remembered(tmp_path, objective, monkeypatch):
    monkeypatch.setattr("castream.training.features.IMAGES_PER_FILE", 4)
    write_shards(tmp_path / "data", "train", [10, 10], broken=(3, 14))
    build(tmp_path / "cache", objective, tmp_path / "data")
    cached = CachedLoader(tmp_path / "cache", 1, 0, 1, 4, seed=0)
    assert sorted(cached.unreadable) == ["0:3", "1:4"] and len(cached) == 18
