"""Features of a frozen backbone, kept on disk, so that an epoch costs the stream alone.

Each file holds a few hundred images of one view; a view is a sample's random state (augmentation, mask), which epochs
repeat in turns. Values are float16: 11 bits of mantissa, against 8 of the bfloat16 that a network may run in.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from castream.artifacts.files import read_json, write_file, write_json
from castream.data.loader import StreamLoader
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from .objectives import Features, Objective
from .steps import to_device

IMAGES_PER_FILE = 512
_KEY = "key.json"
_FEATURES = ("view", "masked")
Row = tuple[tuple[int, ...], object, int, str]  # sort key, open file, row in it, key of the sample


def prepare_cache(folder: Path, key: dict) -> None:
    """Make an empty folder for features, unless it holds those of the same key. For one process to call.

    Args:
        key: what the features and their distribution over files depend on.
    """
    path = folder / _KEY
    if path.is_file() and read_json(path) == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(path, key)


@dataclass
class _Shard:
    """The file that is being filled."""

    folder: Path
    prefix: str
    number: int
    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, tensors: dict[str, torch.Tensor], keys: list[str]) -> None:
        self.batches.append(tensors)
        self.keys += keys

    def write(self, state: dict | str, bad: list[str]) -> None:
        """Write what was added, together with the state of the loader after it, and begin the next file."""
        names = self.batches[0] if self.batches else ()
        tensors = {name: torch.cat([batch[name] for batch in self.batches]) for name in names}
        metadata = json.dumps({"state": state, "keys": self.keys, "bad": bad})
        name = f"{self.prefix}-{self.number:06d}.safetensors"
        write_file(self.folder / name, save_tensors(tensors, metadata={"run": metadata}))
        self.number, self.batches, self.keys = self.number + 1, [], []


def _metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])


def build_cache(
    folder: Path,
    objective: Objective,
    loader: StreamLoader,
    *,
    views: int,
    rank: int,
    limit_bytes: float,
    num_rows: int,
    on_batch: Callable[[int], None],
) -> None:
    """Write the features of all views that this process reads. Goes on where a killed call stopped.

    Args:
        folder: which `prepare_cache` made.
        limit_bytes: size that all processes' features may take together.
        num_rows: rows of the split, to tell before the work whether they fit.
        on_batch: called with the number of images after each batch.

    Raises:
        ValueError: where the features would be larger than allowed, or do not fit float16.
        OSError: where they cannot be written.
    """
    for view in range(views):
        prefix = f"view-{view:03d}-rank-{rank:05d}"
        files = sorted(folder.glob(f"{prefix}-*.safetensors"))
        state = _metadata(files[-1])["state"] if files else None
        on_batch(sum(len(_metadata(path)["keys"]) for path in files))
        if state == "done":
            continue
        shard = _Shard(folder, prefix, len(files))
        for batch, after in loader.epoch(view, state):
            with torch.no_grad():
                tensors = _pack(objective.extract(to_device(batch, objective.mean.device)), batch)
            _check_size(tensors, len(batch["keys"]), num_rows * views, limit_bytes)
            shard.add(tensors, batch["keys"])
            on_batch(len(batch["keys"]))
            if len(shard.keys) >= IMAGES_PER_FILE:
                shard.write(after, loader.bad)
                loader.bad = []
        shard.write("done", loader.bad)
        loader.bad = []


def _check_size(tensors: dict[str, torch.Tensor], images: int, all_images: int, limit_bytes: float) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values()) / images * all_images
    if size > limit_bytes:
        raise ValueError(
            f"cache_features needs about {size / 2**30:.1f} GiB, more than cache_limit_gib={limit_bytes / 2**30:g}: "
            "raise that, name fewer stream_layers or views, or set cache_features=false."
        )


def _pack(features: dict[str, Features], batch: dict) -> dict[str, torch.Tensor]:
    """Flat tensors of a batch: `view.0`, ..., `view.cls`, `masked.0`, ..., `labels`."""
    tensors = {}
    for kind, (feature_maps, cls_token) in features.items():
        for name, value in [*enumerate(feature_maps), ("cls", cls_token)]:
            if value is not None:
                tensors[f"{kind}.{name}"] = value.to("cpu", torch.float16).contiguous()
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("features exceed the range of float16, in which they are kept: set cache_features=false.")
    return tensors | ({"labels": batch["labels"].cpu()} if "labels" in batch else {})


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
        self.unreadable: list[str] = []
        self.views = [self._open(sorted(folder.glob(f"view-{view:03d}-*.safetensors"))) for view in range(views)]

    def _open(self, paths: list[Path]) -> list[Row]:
        """Every image of a view, in the order of the dataset."""
        rows = []
        for path in paths:
            metadata, file = _metadata(path), safe_open(path, "pt")
            keys = metadata["keys"]
            rows += [(tuple(map(int, key.split(":"))), file, row, key) for row, key in enumerate(keys)]
            self.unreadable += [key for key in metadata["bad"] if key not in self.unreadable]
        return sorted(rows, key=lambda row: row[0])

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
                yield self._read([rows[index] for index in mine]), {"batch": batch + 1}

    def _read(self, rows: list[Row]) -> dict:
        """A batch of the rows given, as Objective.forward takes it."""
        names = rows[0][1].keys()
        tensors = {name: torch.cat([file.get_slice(name)[row : row + 1] for _, file, row, _ in rows]) for name in names}
        batch = {"features": {}, "keys": [key for *_, key in rows]}
        for kind in _FEATURES:
            count = sum(name.startswith(f"{kind}.") and name != f"{kind}.cls" for name in names)
            if count:
                maps = tuple(tensors[f"{kind}.{index}"].float() for index in range(count))
                cls_token = tensors.get(f"{kind}.cls")
                batch["features"][kind] = (maps, None if cls_token is None else cls_token.float())
        return batch | ({"labels": tensors["labels"]} if "labels" in tensors else {})
