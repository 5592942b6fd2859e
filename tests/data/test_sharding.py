import pytest
from castream.data.sharding import ShardPlan


def readers(plan: ShardPlan, epoch: int) -> list[list[int]]:
    return [plan.shards(epoch, rank, worker) for rank in range(plan.world_size) for worker in range(plan.busy_workers)]


@pytest.mark.parametrize("num_shards", [294, 1024])
def test_every_shard_has_one_reader_for_every_layout(num_shards):
    layouts = [(world, workers) for world in range(1, 65) for workers in range(1, 17)]
    if num_shards == 1024:
        layouts.append((1024, 8))
    for world, workers in layouts:
        read = readers(ShardPlan(num_shards, world, workers, seed=3), epoch=1)
        assert all(read), f"a worker of {world} x {workers} has nothing to read"
        assert sorted(shard for shards in read for shard in shards) == list(range(num_shards))


def test_processes_differ_by_at_most_one_shard():
    plan = ShardPlan(294, 8, 4)
    per_process = [sum(len(plan.shards(0, rank, worker)) for worker in range(4)) for rank in range(8)]
    assert sorted(per_process) == [36, 36, 37, 37, 37, 37, 37, 37]


def test_epochs_and_seeds_differ_and_repeat():
    plan = ShardPlan(50, 1, 1, seed=1)
    assert plan.shards(0, 0, 0) != plan.shards(1, 0, 0)
    assert plan.shards(0, 0, 0) != ShardPlan(50, 1, 1, seed=2).shards(0, 0, 0)
    assert plan.shards(7, 0, 0) == ShardPlan(50, 1, 1, seed=1).shards(7, 0, 0)


def test_fewer_shards_than_processes_are_refused():
    with pytest.raises(ValueError, match="3 shards for 4 processes"):
        ShardPlan(3, 4, 1)


def test_rows_of_an_unsplittable_source_are_shared_out():
    plan = ShardPlan(1, 3, 2, by_rows=True)
    shares = [plan.row_share(rank, worker) for rank in range(3) for worker in range(2)]
    kept = [number for offset, step in shares for number in range(offset, 100, step)]
    assert sorted(kept) == list(range(100))
    assert all(plan.shards(0, rank, worker) == [0] for rank in range(3) for worker in range(2))


def test_description_names_waiting_and_idle_workers():
    text = ShardPlan(10, 4, 8).describe(1000)
    assert "2 or 3 for each of 4 process(es)" in text
    assert "read by 2 worker(s)" in text and "6 more would have no shard" in text
    assert "16.7 %" in text  # 10 shards in the time of 12
