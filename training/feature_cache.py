"""Features of a frozen backbone, kept on disk, so that an epoch costs the stream alone.

Each file holds a few hundred images of one view; a view is a sample's random state (augmentation, mask), which epochs
repeat in turns. Values are float16: 11 bits of mantissa, against 8 of the bfloat16 that a network may run in.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from castream.artifacts.files import read_json, write_file, write_json
from castream.data.loader import StreamLoader
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from tqdm import tqdm

from .logging import BadImages
from .loop import InterruptedRun, Interruption, to_device
from .objective import Features, Objective

IMAGES_PER_FILE = 512
_KEY = "key.json"
_FEATURES = ("view", "masked", "fidelity")
Row = tuple[tuple[int, ...], object, int, str]  # sort key, open file, row in it, key of the sample


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
        folder: of a FeatureCache that all processes have built.
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


class FeatureCache:
    """The folder of cached features, which all processes share.

    Args:
        folder: of the files.
        views: number of views.
        num_rows: rows of the split, to tell before the work whether its features fit.
        limit_bytes: size that all features may take together.
    """

    def __init__(self, folder: Path, views: int, num_rows: int, limit_bytes: float):
        self.folder, self.views, self.num_rows, self.limit_bytes = folder, views, num_rows, limit_bytes

    def prepare(self, accelerator: Accelerator, key: dict) -> None:
        """Empty the folder, unless it holds features of the same key.

        Args:
            key: what the features and their distribution over files depend on.
        """
        path = self.folder / _KEY
        if accelerator.is_main_process and not (path.is_file() and read_json(path) == key):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(path, key)
        accelerator.wait_for_everyone()

    def build(
        self,
        accelerator: Accelerator,
        objective: Objective,
        loader: StreamLoader,
        interruption: Interruption,
        bad_images: BadImages,
    ) -> None:
        """Write the features of all views that this process reads. Goes on where a killed call stopped.

        Raises:
            ValueError: where they would be too large, do not fit float16, or too many images are unreadable.
            OSError: where they cannot be written.
            InterruptedRun: when told to stop; what is written is kept.
        """
        hidden, images = not accelerator.is_main_process, self.num_rows * self.views
        with tqdm(total=images, unit="img", desc="caching features", disable=hidden) as bar:
            for view in range(self.views):
                for count in self._write_view(view, accelerator, objective, loader):
                    bar.update(count * accelerator.num_processes)
                    bad_images.check(len(set(loader.bad)), loader.rows)
                    if interruption.requested:
                        raise InterruptedRun("stopped while caching features: the same command goes on from there")
        accelerator.wait_for_everyone()

    def _write_view(
        self, view: int, accelerator: Accelerator, objective: Objective, loader: StreamLoader
    ) -> Iterator[int]:
        """Yields the number of images after each batch, and of those that are there already."""
        prefix = f"view-{view:03d}-rank-{accelerator.process_index:05d}"
        files = sorted(self.folder.glob(f"{prefix}-*.safetensors"))
        state = _metadata(files[-1])["state"] if files else None
        yield sum(len(_metadata(path)["keys"]) for path in files)
        if state == "done":
            return
        shard, written = _Shard(self.folder, prefix, len(files)), len(loader.bad)
        for batch, after in loader.epoch(view, state):
            with torch.no_grad(), accelerator.autocast():
                features = objective.extract(to_device(batch, accelerator.device))
            tensors = _pack(features, batch)
            self._check_size(tensors, len(batch["keys"]))
            shard.add(tensors, batch["keys"])
            yield len(batch["keys"])
            if len(shard.keys) >= IMAGES_PER_FILE:
                shard.write(after, loader.bad[written:])
                written = len(loader.bad)
        shard.write("done", loader.bad[written:])

    def _check_size(self, tensors: dict[str, torch.Tensor], images: int) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values()) / images * self.num_rows * self.views
        if size > self.limit_bytes:
            raise ValueError(
                f"cache_features needs about {size / 2**30:.1f} GiB, more than cache_limit_gib="
                f"{self.limit_bytes / 2**30:g}: raise that, name fewer stream_layers or views, or set "
                "cache_features=false."
            )

    def open(self, accelerator: Accelerator, batch_size: int, seed: int, bad_images: BadImages) -> CachedLoader:
        """Batches of the features of all processes, which have built them.

        Raises:
            ValueError: where too many images are unreadable.
        """
        world, rank = accelerator.num_processes, accelerator.process_index
        loader = CachedLoader(self.folder, self.views, rank, world, batch_size, seed)
        if accelerator.is_main_process:
            bad_images.note(loader.unreadable)
        bad_images.check(len(loader.unreadable), len(loader) + len(loader.unreadable), final=True)
        if not len(loader):
            raise ValueError("not one image of the training split could be decoded: see bad_images.txt.")
        return loader
