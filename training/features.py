"""Features of a frozen backbone, kept on disk, so that an epoch costs the stream alone.

One safetensors file per few hundred images and view; a view is a sample's random state (augmentation, mask), which the
epochs repeat in turns. Values are float16: 11 bits of mantissa, against 8 of the bfloat16 that a network may run in.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from .data import StreamLoader
from .objectives import Features, Objective
from .storage import write_file

_FEATURES = ("view", "masked")
Row = tuple[object, int, str]  # open file, row in it, key of the sample


def build_cache(
    folder: Path,
    objective: Objective,
    loader: StreamLoader,
    *,
    views: int,
    rank: int,
    key: dict,
    limit_bytes: float,
    num_rows: int | None,
    on_batch: Callable[[int], None],
) -> None:
    """Write the features of all views that this process reads. Goes on where a killed call stopped.

    Args:
        key: what the features depend on; a folder made with another key is emptied.
        limit_bytes: size that all processes' features may take together.
        num_rows: rows of the split, to tell before the work whether they fit; None if unknown.
        on_batch: called with the number of images after each batch.

    Raises:
        ValueError: where the features would be larger than allowed, or do not fit float16.
        OSError: where they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(views):
        state, number = _resume(folder, view, rank, key)
        if state == "done":
            continue
        with torch.no_grad():
            for batch, after in loader.epoch(view, state):
                tensors = _pack(objective.extract(batch), batch)
                size = sum(tensor.nbytes for tensor in tensors.values()) / len(batch["keys"])
                if size * (num_rows or 0) * views > limit_bytes:
                    raise ValueError(
                        f"cache_features needs about {size * num_rows * views / 2**30:.1f} GiB, more than "
                        f"cache_limit_gib={limit_bytes / 2**30:g}: raise that, name fewer stream_layers or views, "
                        "or set cache_features=false."
                    )
                _write(folder, view, rank, number, tensors, {"key": key, "state": after, "keys": batch["keys"]})
                number += 1
                on_batch(len(batch["keys"]))
        _write(folder, view, rank, number, {}, {"key": key, "state": "done", "keys": []})


def _name(view: int, rank: int, number: int) -> str:
    return f"view-{view:03d}-rank-{rank:05d}-{number:06d}.safetensors"


def _resume(folder: Path, view: int, rank: int, key: dict) -> tuple[dict | str | None, int]:
    """Where the writing of a view stopped: the loader's state, or "done"; and the number of the next file."""
    files = sorted(folder.glob(_name(view, rank, 0).replace("-000000.", "-*.")))
    if not files:
        return None, 0
    with safe_open(files[-1], "pt") as file:
        metadata = json.loads(file.metadata()["run"])
    if metadata["key"] != key:
        for path in files:
            path.unlink()
        return None, 0
    return metadata["state"], len(files)


def _write(folder: Path, view: int, rank: int, number: int, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    data = save_tensors(tensors, metadata={"run": json.dumps(metadata)})
    write_file(folder / _name(view, rank, number), data)


def _pack(features: dict[str, Features], batch: dict) -> dict[str, torch.Tensor]:
    """Flat tensors of a batch: `view.0`, ..., `view.cls`, `masked.0`, ..., `labels`."""
    tensors = {}
    for kind, (feature_maps, cls_token) in features.items():
        for name, value in [*enumerate(feature_maps), ("cls", cls_token)]:
            if value is not None:
                tensors[f"{kind}.{name}"] = value.to("cpu", torch.float16).contiguous()
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("features exceed the range of float16, in which they are kept: set cache_features=false.")
    return tensors | ({"labels": batch["labels"].contiguous()} if "labels" in batch else {})


class CachedLoader:
    """Batches of cached features, with the interface of StreamLoader.

    All rows are permuted together, afresh in every epoch; batch number n of all processes together is the same set of
    images whatever the number of processes.

    Args:
        folder: which `build_cache` filled, on all processes.
        views: number of views; epoch e reads view e modulo it.
        rank, world_size: of this process.
        batch_size: images per process.
        seed: of the order.
    """

    def __init__(self, folder: Path, views: int, rank: int, world_size: int, batch_size: int, seed: int):
        self.rank, self.world_size, self.batch_size, self.seed = rank, world_size, batch_size, seed
        self.rows, self.bad = 0, []
        self.views = [self._open(sorted(folder.glob(f"view-{view:03d}-*.safetensors"))) for view in range(views)]

    @staticmethod
    def _open(paths: list[Path]) -> list[Row]:
        """(file, row, key) of every image of a view."""
        rows = []
        for path in paths:
            file = safe_open(path, "pt")
            keys = json.loads(file.metadata()["run"])["keys"]
            rows += [(file, row, key) for row, key in enumerate(keys)]
        return rows

    def __len__(self) -> int:
        """Images in a view."""
        return len(self.views[0])

    def epoch(self, epoch: int, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """As StreamLoader.epoch; the state is a number of batches."""
        rows = self.views[epoch % len(self.views)]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(rows))
        together = self.batch_size * self.world_size
        start = state["batch"] if state else 0
        for batch in range(start, -(-len(rows) // together)):
            mine = order[batch * together :][:together][self.rank * self.batch_size :][: self.batch_size]
            if len(mine):
                self.rows += len(mine)
                yield self.read([rows[index] for index in mine]), {"batch": batch + 1}

    def read(self, rows: list[Row]) -> dict:
        """A batch of the rows given, as Objective.forward takes it."""
        names = rows[0][0].keys()
        tensors = {name: torch.cat([file.get_slice(name)[row : row + 1] for file, row, _ in rows]) for name in names}
        batch = {"features": {}, "keys": [key for _, _, key in rows]}
        for kind in _FEATURES:
            count = sum(name.startswith(f"{kind}.") and name != f"{kind}.cls" for name in names)
            if count:
                maps = tuple(tensors[f"{kind}.{index}"].float() for index in range(count))
                cls_token = tensors.get(f"{kind}.cls")
                batch["features"][kind] = (maps, None if cls_token is None else cls_token.float())
        return batch | ({"labels": tensors["labels"]} if "labels" in tensors else {})
