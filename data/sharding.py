"""Who reads what: the one owner of sharding.

Shards go to processes first and to a process's workers second, afresh in every epoch from one seed. A source that
cannot be split (a folder of images is a single stream of paths) is read by everyone, each keeping every n-th row.
Every row has exactly one reader per epoch, so uneven shards end some readers early and lose nothing: the training loop
weighs each image alike and lets a process that has run out wait with an empty batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def _shuffled(num_shards: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_shards)


@dataclass(frozen=True)
class ShardPlan:
    """The reading plan of a split.

    Args:
        num_shards: shards of the split.
        world_size: processes, over all nodes.
        num_workers: reading workers per process, at least 1.
        seed: of the order of the shards.
        by_rows: whether every reader walks through all rows and keeps its share of them.

    Raises:
        ValueError: where a process would have nothing to read.
    """

    num_shards: int
    world_size: int
    num_workers: int
    seed: int = 0
    by_rows: bool = False

    def __post_init__(self):
        if not self.by_rows and self.num_shards < self.world_size:
            raise ValueError(
                f"the dataset has {self.num_shards} shards for {self.world_size} processes: use at most "
                f"{self.num_shards} processes, more shards, or (parquet) --reshard true."
            )

    @property
    def busy_workers(self) -> int:
        """Workers per process that have a shard of their own in every process; more would idle."""
        return self.num_workers if self.by_rows else min(self.num_workers, self.num_shards // self.world_size)

    def shards(self, epoch: int, rank: int, worker: int) -> list[int]:
        """Shards that a worker reads in an epoch, in this order."""
        if self.by_rows:
            return list(range(self.num_shards))
        order = _shuffled(self.num_shards, self.seed, epoch)
        return order[rank :: self.world_size][worker :: self.busy_workers].tolist()

    def row_share(self, rank: int, worker: int) -> tuple[int, int]:
        """(offset, step): a worker keeps the rows number offset, offset + step, ... of what it reads."""
        if not self.by_rows:
            return 0, 1
        return worker * self.world_size + rank, self.world_size * self.busy_workers

    def describe(self, num_rows: int | None) -> str:
        """The plan in a line or two, for the start of a run."""
        rows = "an unknown number of images" if num_rows is None else f"{num_rows:,} images"
        if self.by_rows:
            readers = self.world_size * self.busy_workers
            share = "one reader" if readers == 1 else f"each of {readers} readers keeps its share of the rows"
            return f"{rows} in one unsplittable source: {share}"
        most = -(-self.num_shards // self.world_size)
        least = self.num_shards // self.world_size
        share = str(most) if most == least else f"{least} or {most}"
        text = f"{rows} in {self.num_shards} shards: {share} for each of {self.world_size} process(es), "
        text += f"read by {self.busy_workers} worker(s) each"
        if self.busy_workers < self.num_workers:
            text += f" ({self.num_workers - self.busy_workers} more would have no shard)"
        if most != least:
            waiting = 100 * (1 - self.num_shards / (most * self.world_size))
            text += f"; uneven: up to {waiting:.1f} % of an epoch is spent waiting"
        return text
