"""The embedded dataset: the pictures are reproducible and their masks true, and the cache is all or nothing."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from castream.data.scenes import dataset as scenes
from castream.data.scenes.dataset import scenes_data_files, write_scenes
from castream.data.scenes.rendering import CLASS_NAMES, balanced_label, render_scene
from datasets import load_dataset
from PIL import Image, ImageFilter

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"num_train": 24, "num_validation": 12, "shards_per_split": 3, "size": 48, "num_workers": 1, "progress": False}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("cache"), **SMALL)


# Scenes


def test_scene_is_a_function_of_seed_split_and_index():
    first, again = render_scene(3, 7, size=64), render_scene(3, 7, size=64)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.mask.tobytes() == again.mask.tobytes()
    assert first.label == again.label
    for other in (render_scene(4, 7, size=64), render_scene(3, 8, size=64), render_scene(3, 7, size=64, split="test")):
        assert np.abs(pixels(first.image) - pixels(other.image)).mean() > 5


def test_scene_format():
    scene = render_scene(0, 0)
    assert scene.image.mode == "RGB" and scene.mask.mode == "L"
    assert scene.image.size == scene.mask.size == (224, 224)
    assert set(np.unique(scene.mask)) == {0, 255}


def test_labels_are_balanced_and_shuffled():
    labels = [balanced_label(0, index) for index in range(5 * len(CLASS_NAMES))]
    assert set(Counter(labels).values()) == {5}
    assert labels[: len(CLASS_NAMES)] != labels[len(CLASS_NAMES) : 2 * len(CLASS_NAMES)]
    assert render_scene(0, 17, size=32).label == labels[17]


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_mask_is_where_the_object_is(label):
    for index in range(4):
        scene = render_scene(11, index, size=128, label=label)
        background = render_scene(11, index, size=128, label=label, with_object=False)
        assert scene.label == label
        assert not pixels(background.mask).any()
        change = pixels(scene.image) - pixels(background.image)
        inside = pixels(scene.mask) > 0
        assert 0.04 < inside.mean() < 0.4
        assert (np.abs(change[inside]).max(1) > 6).mean() > 0.85
        # Outside, the object may only cast its shadow. Antialiasing and the lens smear its edge by a pixel or two.
        outside = pixels(scene.mask.filter(ImageFilter.MaxFilter(7))) == 0
        assert (change[outside] <= 1).mean() > 0.999
        assert (np.abs(change[outside]).max(1) <= 1).mean() > 0.4


def test_background_does_not_know_the_class():
    pictures = {render_scene(5, 2, size=64, label=label, with_object=False).image.tobytes() for label in range(12)}
    assert len(pictures) == 1


def test_objects_are_spread_over_the_image():
    centres = []
    for index in range(48):
        rows, columns = np.nonzero(pixels(render_scene(2, index, size=64).mask))
        centres.append((rows.mean() / 64, columns.mean() / 64))
    assert (np.std(centres, axis=0) > 0.08).all()
    assert (np.abs(np.mean(centres, axis=0) - 0.5) < 0.08).all()


@pytest.mark.parametrize(("arguments", "message"), [({"size": 16}, "at least 32"), ({"label": 12}, r"0\.\.11, got 12")])
def test_bad_scene_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_scene(0, 0, **arguments)


# Dataset


def test_streaming_round_trip(folder):
    files = scenes_data_files(folder)
    assert [Path(name).name for name in files["train"]] == [f"train-{shard:05d}-of-00003.parquet" for shard in range(3)]
    streams = load_dataset("parquet", data_files=files, streaming=True)
    assert streams["train"].num_shards == 3
    assert streams["train"].features["label"].names == list(CLASS_NAMES)
    rows = {split: list(streams[split]) for split in ("train", "validation")}
    assert [row["index"] for row in rows["train"]] == list(range(24))
    assert Counter(row["label"] for row in rows["train"]) == dict.fromkeys(range(12), 2)
    assert Counter(row["label"] for row in rows["validation"]) == dict.fromkeys(range(12), 1)
    for split, index in (("train", 13), ("validation", 5)):
        row, scene = rows[split][index], render_scene(0, index, size=48, split=split)
        assert row["image"].format == "JPEG"
        assert row["label"] == scene.label
        np.testing.assert_array_equal(pixels(row["mask"]), pixels(scene.mask))
        assert np.abs(pixels(row["image"]) - pixels(scene.image)).mean() < 12  # JPEG halves the colour resolution


def test_contents_do_not_depend_on_workers_or_shards(folder, tmp_path):
    parallel = write_scenes(tmp_path, **SMALL | {"num_workers": 2})
    assert parallel.name == folder.name
    assert contents(parallel) == contents(folder)
    single = write_scenes(tmp_path, **SMALL | {"shards_per_split": 1})
    shards = [pq.read_table(name) for name in scenes_data_files(folder)["train"]]
    rows = [row for shard in shards for row in shard.to_pylist()]
    assert pq.read_table(scenes_data_files(single)["train"]).to_pylist() == rows


def test_seed_and_sizes_have_folders_of_their_own(folder):
    other = write_scenes(folder.parent, **SMALL | {"seed": 1})
    assert other != folder
    first, second = (pq.read_table(scenes_data_files(path)["train"][0])["image"][0] for path in (folder, other))
    assert first != second


def test_finished_dataset_is_not_drawn_again(folder, monkeypatch):
    monkeypatch.setattr(scenes, "_write_folder", lambda *args: pytest.fail("drawn again"))
    assert write_scenes(folder.parent, **SMALL) == folder


def test_default_cache_follows_the_environment(folder, monkeypatch):
    monkeypatch.setenv("CASTREAM_CACHE", str(folder.parent))
    assert write_scenes(**SMALL) == folder


def test_full_disk_leaves_nothing_behind_and_a_second_run_completes(folder, tmp_path, monkeypatch):
    write_shard = scenes._write_shard

    def failing(path, *args):
        write_shard(path, *args)
        if path.name.startswith("train-00001"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_write_shard", failing)
        with pytest.raises(OSError) as caught:
            write_scenes(tmp_path, **SMALL)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value) and "CASTREAM_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert contents(write_scenes(tmp_path, **SMALL)) == contents(folder)


def test_killed_run_leaves_nothing_under_the_final_name(folder, tmp_path):
    (tmp_path / "draw.py").write_text(
        "from castream.data.scenes.dataset import write_scenes\n"
        f"if __name__ == '__main__':\n    write_scenes({str(tmp_path / 'cache')!r}, **{SMALL | {'size': 480}!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, tmp_path / "draw.py"], env=environment)
    cache, deadline = tmp_path / "cache", time.monotonic() + 60
    while not list(cache.glob("*.incomplete/train-00000*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".incomplete"]
    # The same parameters at a size that is quick to draw would be another dataset, so the remains get this one's name.
    next(cache.glob("*.incomplete")).rename(cache / f"{folder.name}.incomplete")
    assert contents(write_scenes(cache, **SMALL)) == contents(folder)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_concurrent_calls_write_once(folder, tmp_path, monkeypatch):
    calls, write_folder = [], scenes._write_folder
    monkeypatch.setattr(scenes, "_write_folder", lambda *args: (calls.append(args), write_folder(*args)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(write_scenes(tmp_path, **SMALL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [contents(result) for result in results] == [contents(folder)] * 3


def test_unwritable_cache_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the scenes dataset to .*file/cache: .*CASTREAM_CACHE") as caught:
        write_scenes(tmp_path / "file" / "cache", **SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"size": 8}, "size must be at least 32, got 8"),
        ({"num_validation": 0}, "num_validation must be at least 1, got 0"),
        ({"shards_per_split": 13}, "shards_per_split=13 exceeds the 12 images"),
    ],
)
def test_bad_dataset_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path, **SMALL | arguments)
    assert not list(tmp_path.iterdir())


def test_module_does_not_import_torch():
    code = "import sys, castream.data.scenes.rendering, castream.data.scenes.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
