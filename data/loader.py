"""Reading a split: workers that read, shuffle, decode and batch their shards, and a loader whose place can be saved.

Resuming is exact for every shuffle window and both kinds of plan. A worker reads its shards, several at a time in
turns, in blocks of `shuffle_window` rows, and permutes each block by a seed that belongs to the block; so its place
is where the block starts and how far into it the run has come, and what a resumed run reads twice is at most one block
of encoded images. The randomness of a sample (augmentation, mask) is seeded by the sample's own key and view, and so
does not depend on who reads it or when.
"""

import hashlib
import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .decoding import DECODING_ERRORS, read_image
from .sharding import ShardPlan
from .split import Split
from .transforms import ImageTransform, random_mask_noise

_LISTED = ("key", "images")  # what `collate` does not merely stack
READ_ROWS = 8  # rows taken from a shard at a time; encoded, so a matter of overhead only


@dataclass(frozen=True)
class ReaderSettings:
    """What decides the contents and the order of the batches.

    Args:
        batch_size: samples per batch.
        shuffle_window, interleave: see TrainingArguments.
        views: random views of a sample that the epochs repeat in turns; None: a new one in every epoch.
        num_labels: classes; labels are checked against it.
        seed: of order and views.
    """

    batch_size: int
    shuffle_window: int
    interleave: int
    views: int | None
    num_labels: int
    seed: int


class ShardReader(IterableDataset):
    """The rows of one process in one epoch, as batches; iterated in worker processes.

    Yields:
        `{"batch": {...}, "worker": int, "position": dict, "rows": int, "bad": [line, ...]}`, with "position" where the
        worker stands after this batch, "rows" the rows read since the last one and "bad" a line for each of those that
        did not decode: its file, or place, a tab, and the reason; or `{"error": text}` where a shard cannot be read or
        a label is wrong, since an exception would arrive as a page.
    """

    def __init__(self, split: Split, plan: ShardPlan, rank: int, transform: ImageTransform, settings: ReaderSettings):
        self.split, self.plan, self.rank, self.transform, self.settings = split, plan, rank, transform, settings
        columns = [split.image_column] + ([split.label_column] if split.label_column else [])
        self.stream = split.stream.select_columns(columns)
        self.epoch, self.state, self.first_worker = 0, {}, 0

    def start(self, epoch: int, state: dict, first_worker: int) -> None:
        """Set the epoch, the workers' positions in it, and which of them delivers first."""
        self.epoch, self.state, self.first_worker = epoch, state, first_worker

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, count = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.first_worker) % count
        try:
            yield from self._batches(worker, self.state.get(str(worker)))
        except (OSError, ValueError, EOFError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield {"error": f"epoch {self.epoch}, process {self.rank}, worker {worker}: {reason}"}

    def _batches(self, worker: int, position: dict | None) -> Iterator[dict]:
        samples, rows, bad = [], 0, []
        rng_state = torch.get_rng_state()  # without workers this is the training process, which has its own use for it
        for key, row, after in self._shuffled(worker, position):
            rows += 1
            try:
                samples.append(self._sample(key, row))
            except _UndecodableError as error:
                bad.append(f"{self.split.row_name(row, key)}\t{error}")
            if len(samples) == self.settings.batch_size:
                torch.set_rng_state(rng_state)
                yield {
                    "batch": collate(samples),
                    "worker": worker,
                    "position": after,
                    "rows": rows,
                    "bad": bad,
                }
                rng_state, samples, rows, bad = torch.get_rng_state(), [], 0, []
        torch.set_rng_state(rng_state)
        batch = collate(samples) if samples else None
        yield {"batch": batch, "worker": worker, "position": "done", "rows": rows, "bad": bad}

    def _sample(self, key: str, row: dict) -> dict:
        """A row decoded, in its view."""
        try:
            pixels = read_image(row[self.split.image_column])
        except DECODING_ERRORS as error:
            raise _UndecodableError(" ".join(str(error).split()) or type(error).__name__) from error
        views = self.settings.views
        view = self.epoch if views is None else self.epoch % views
        seed = sample_seed(self.settings.seed, key, view)
        torch.default_generator.manual_seed(seed)
        sample = {"key": key, "images": self.transform(pixels), "noise": random_mask_noise(torch.default_generator)}
        sample["seed"] = torch.tensor(seed)
        if self.split.label_column:
            sample["labels"] = self._label(row, key)
        return sample

    def _label(self, row: dict, key: str) -> torch.Tensor:
        """A class id, or with several labels an image 0/1 floats (num_labels,)."""
        ids = self.split.class_ids(row, self.split.row_name(row, key), self.settings.num_labels)
        ids = torch.tensor(ids, dtype=torch.long)
        if not self.split.multi_label:
            return ids[0]
        return torch.zeros(self.settings.num_labels).index_fill_(0, ids, 1.0)

    def _shuffled(self, worker: int, position: dict | None) -> Iterator[tuple[str, dict, dict]]:
        """Keys and rows in the order of the epoch, each with the position after it."""
        position = position or {"block": 0, "offset": 0, "lanes": None}
        block, offset = position["block"], position["offset"]
        reader = _InterleavedShards(self, worker, position["lanes"])
        size = max(1, self.settings.shuffle_window)
        while True:
            start = reader.position()
            rows = list(itertools.islice(reader, size))
            if not rows:
                return
            order = np.random.default_rng((self.settings.seed, self.epoch, self.rank, worker, block)).permutation(
                len(rows)
            )
            for index in range(offset, len(rows)):
                yield (*rows[order[index]], {"block": block, "offset": index + 1, "lanes": start})
            block, offset = block + 1, 0

    def read_shard(self, shard: int, worker: int, skip: int) -> Iterator[tuple[int, dict]]:
        """Rows of a shard that are this worker's, each with its number in the shard, after the first `skip` rows."""
        stream = self.stream
        if self.plan.num_shards > 1:
            stream = stream.shard(num_shards=self.plan.num_shards, index=shard)
        offset, step = self.plan.row_share(self.rank, worker)
        number = 0
        for columns in stream.iter(batch_size=READ_ROWS):  # unlike iter(stream), it leaves the workers' shares to us
            names = list(columns)
            for values in zip(*columns.values(), strict=True):
                if number >= skip and number % step == offset:
                    yield number, dict(zip(names, values, strict=True))
                number += 1


class _UndecodableError(Exception):
    """An image does not decode; the text is the reason."""


class _InterleavedShards:
    """The rows of a worker's shards, `interleave` shards at a time in turns. Iterating goes on where it stopped."""

    def __init__(self, reader: ShardReader, worker: int, state: dict | None):
        self.reader, self.worker = reader, worker
        self.shards = reader.plan.shards(reader.epoch, reader.rank, worker)
        if state is None:
            count = min(reader.settings.interleave, len(self.shards))
            state = {"open": [[index, 0] for index in range(count)], "turn": 0, "next": count}
        self.cursors = [list(cursor) for cursor in state["open"]]  # [place in self.shards, rows passed]
        self.turn, self.next = state["turn"], state["next"]
        self.iterators = [self._rows(cursor) for cursor in self.cursors]

    def position(self) -> dict:
        """Where the next row comes from; what the constructor takes as `state`."""
        return {"open": [list(cursor) for cursor in self.cursors], "turn": self.turn, "next": self.next}

    def _rows(self, cursor: list[int]) -> Iterator[tuple[int, dict]]:
        return self.reader.read_shard(self.shards[cursor[0]], self.worker, cursor[1])

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        while self.cursors:
            cursor = self.cursors[self.turn]
            found = next(self.iterators[self.turn], None)
            if found is not None:
                number, row = found
                cursor[1] = number + 1
                key = f"{self.shards[cursor[0]]}:{number}"
                self.turn = (self.turn + 1) % len(self.cursors)
                yield key, row
            elif self.next < len(self.shards):
                cursor[:] = [self.next, 0]
                self.next += 1
                self.iterators[self.turn] = self._rows(cursor)
            else:
                del self.cursors[self.turn], self.iterators[self.turn]
                self.turn = self.turn % len(self.cursors) if self.cursors else 0


def sample_seed(seed: int, key: str, view: int) -> int:
    """Seed of a sample's view, the same wherever and whenever it is read."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{view}:{key}".encode(), digest_size=7).digest(), "big")


def collate(samples: list[dict]) -> dict:
    """Samples -> batch: tensors stacked, images channels last, as they were decoded; keys listed."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name not in _LISTED}
    images = torch.stack([sample["images"].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    return batch | {"images": images, "keys": [sample["key"] for sample in samples]}


def cut(batches: list[dict], size: int) -> list[dict]:
    """Put batches together and cut them into batches of `size`, the last one smaller."""
    if not batches:
        return []
    names = [name for name in batches[0] if name != "keys"]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    keys = [key for batch in batches for key in batch["keys"]]
    return [
        {name: whole[name][start : start + size] for name in names} | {"keys": keys[start : start + size]}
        for start in range(0, len(keys), size)
    ]


def ignore_interruptions(worker: int) -> None:
    """For a loader's workers: a signal to the whole process group is the main process's to act on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class StreamLoader:
    """Batches of one process, epoch after epoch, from a place that can be saved and returned to.

    Workers deliver full batches in turns. What each has left at its end is put together, in the order of the workers,
    into the epoch's last batches, so that only the very last one is smaller.

    Args:
        split, plan, transform, settings: see the classes.
        rank: of this process in the plan.
        in_process: read in this process, not in a worker; needs a plan with one worker.
    """

    def __init__(
        self,
        split: Split,
        plan: ShardPlan,
        rank: int,
        transform: ImageTransform,
        settings: ReaderSettings,
        in_process: bool = False,
    ):
        self.reader = ShardReader(split, plan, rank, transform, settings)
        self.num_readers = plan.busy_workers
        self.num_workers = 0 if in_process else plan.busy_workers
        self.batch_size = settings.batch_size
        self.rows = 0
        self.bad: list[str] = []

    def epoch(self, epoch: int, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Batches of an epoch, each with the state from which the epoch goes on after it.

        Meanwhile `rows` and `bad` count what was read, and list what did not decode, since they were last emptied.

        Args:
            state: what came with the last batch that was used; None for the start.

        Raises:
            ValueError: where a shard cannot be read or a label is out of range.
        """
        state = state or {"workers": {}, "turn": 0, "tail": 0}
        workers, turn = dict(state["workers"]), state["turn"]
        leftovers = {}
        for item in self._items(epoch, workers, turn):
            if "error" in item:
                raise ValueError(f"reading the dataset failed: {item['error']}")
            worker = item["worker"]
            if item["position"] != "done":
                self._count(item)
                workers[str(worker)] = item["position"]
                turn = (worker + 1) % self.num_readers
                yield item["batch"], {"workers": dict(workers), "turn": turn, "tail": 0}
            else:
                leftovers[worker] = item
        tail = [leftovers[worker] for worker in sorted(leftovers)]
        if not state["tail"]:
            for item in tail:
                self._count(item)
        batches = cut([item["batch"] for item in tail if item["batch"]], self.batch_size)
        for index in range(state["tail"], len(batches)):
            yield batches[index], {"workers": workers, "turn": turn, "tail": index + 1}

    def _count(self, item: dict) -> None:
        self.rows += item["rows"]
        self.bad += item["bad"]

    def _items(self, epoch: int, positions: dict, turn: int) -> Iterator[dict]:
        self.reader.start(epoch, dict(positions), turn)
        prefetch = 2 if self.num_workers else None
        yield from DataLoader(
            self.reader,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=prefetch,
            worker_init_fn=ignore_interruptions,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),  # so that a copy to the GPU need not wait
            generator=torch.Generator(),  # else the loader draws from the training process's own
        )
