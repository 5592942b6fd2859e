import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from castream.artifacts import files as storage
from castream.artifacts.files import new_folder, remove_partial, write_file
from castream.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint


def save(folder, step, keep=2):
    tensors = {"weight": torch.full((3,), float(step))}
    return save_checkpoint(folder, step, tensors, {"lr": step}, {"at": step}, [{"place": None}, {"place": 1}], keep)


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path) == (None, [])
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    checkpoint, notes = load_checkpoint(tmp_path)
    assert notes == []
    assert (checkpoint["step"], checkpoint["optimizer"], checkpoint["state"]) == (15, {"lr": 15}, {"at": 15})
    assert checkpoint["ranks"] == [{"place": None}, {"place": 1}]
    assert checkpoint["tensors"]["weight"].tolist() == [15.0, 15.0, 15.0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rank-00001.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    checkpoint, notes = load_checkpoint(tmp_path)
    assert checkpoint["step"] == 1
    assert len(notes) == 1 and "step-00000002 is damaged" in notes[0]


def test_half_a_deletion_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def killed(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("castream.training.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.partial", "step-00000002"]


def test_without_an_intact_one_the_run_begins_again_and_says_so(tmp_path):
    (save(tmp_path, 1) / "state.json").write_text('{"step": 2, "state": {"at": 2}}')  # valid, but not what was saved
    checkpoint, notes = load_checkpoint(tmp_path)
    assert checkpoint is None
    assert "state.json does not match its checksum" in notes[0] and "beginning again" in notes[1]


def test_random_states_return():
    state = random_state()
    first = (torch.rand(2).tolist(), np.random.rand(), random.random())
    restore_random_state(state)
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == first


def test_a_full_disk_leaves_the_old_and_nothing_new(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; free some space") as error:
        save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[0]["step"] == 1


def test_a_folder_is_whole_or_absent(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(RuntimeError, match="halfway"), new_folder(final) as folder:
        (folder / "part").write_text("1")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with new_folder(final) as folder:
            (folder / "part").write_text(text)
    assert (final / "part").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_a_killed_run_go_and_what_it_was_replacing_returns(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "initial.old.partial").mkdir()
    write_file(tmp_path / "initial.old.partial" / "config.json", b"{}")
    (tmp_path / "settings.yaml.partial").write_text("half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["initial"]


@pytest.mark.slow
def test_kill_9_while_saving_never_leaves_half_a_checkpoint(tmp_path):
    code = f"""
    import itertools, torch
    from pathlib import Path
    from castream.training.checkpoint import save_checkpoint
    for step in itertools.count(1):
        tensors = {{"weight": torch.full((300_000,), float(step))}}
        save_checkpoint(Path({str(tmp_path)!r}), step, tensors, {{}}, {{"at": step}}, [{{}}], keep=2)
        print(step, flush=True)
    """
    rng = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        steps = [int(line) for line in process.communicate()[0].split()]
        remove_partial(tmp_path)
        checkpoint, notes = load_checkpoint(tmp_path)
        assert notes == [] and checkpoint["step"] >= max(steps, default=1)
        assert checkpoint["tensors"]["weight"].unique().tolist() == [float(checkpoint["state"]["at"])]
        for path in tmp_path.iterdir():
            for part in path.iterdir():
                part.unlink()
            path.rmdir()
