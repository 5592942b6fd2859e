"""Cached features are the backbone's, whoever wrote them, and an interrupted cache goes on."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from castream.training.feature_cache import CachedLoader, FeatureCache
from castream.training.loop import InterruptedRun

from tests.data.test_loader import make_loader
from tests.training.test_objective import make
from tests.training.tiny_data import write_shards


def build(folder, objective, data, world=1, views=1, stop_after=None, key="a", limit=1e9, bf16=False):
    cache = FeatureCache(folder, views, 32, limit)
    for rank in range(world):
        accelerator = SimpleNamespace(
            num_processes=world,
            process_index=rank,
            is_main_process=rank == 0,
            autocast=partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16),
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
        )
        cache.prepare(accelerator, {"key": key})
        interruption = Countdown(stop_after)
        bad_images = SimpleNamespace(check=interruption.count)
        cache.build(
            accelerator, objective, make_loader(data, world=world, rank=rank, views=views), interruption, bad_images
        )


class Countdown:
    """An interruption that comes once more than some rows have been read."""

    def __init__(self, stop_after):
        self.stop_after, self.requested = stop_after, False

    def count(self, bad, rows):
        self.requested = self.stop_after is not None and rows > self.stop_after


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
    monkeypatch.setattr("castream.training.feature_cache.IMAGES_PER_FILE", 8)
    build(tmp_path / "whole", objective, tiny_dataset)
    for stop in (5, 20):
        with pytest.raises(InterruptedRun):
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
    monkeypatch.setattr("castream.training.feature_cache.IMAGES_PER_FILE", 4)
    write_shards(tmp_path / "data", "train", [10, 10], broken=(3, 14))
    build(tmp_path / "cache", objective, tmp_path / "data")
    cached = CachedLoader(tmp_path / "cache", 1, 0, 1, 4, seed=0)
    names = [line.split("\t")[0] for line in sorted(cached.unreadable)]
    assert names == ["train-00000.parquet:3", "train-00001.parquet:4"] and len(cached) == 18


def test_features_of_a_bf16_forward_pass(tmp_path, tiny_dataset, objective):
    build(tmp_path / "half", objective, tiny_dataset, bf16=True)
    build(tmp_path / "whole", objective, tiny_dataset)
    half, whole = (
        next(CachedLoader(tmp_path / name, 1, 0, 1, 32, seed=0).epoch(0))[0]["features"]["view"][0]
        for name in ("half", "whole")
    )
    for found, expected in zip(half, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
