from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PROCESSES = {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16}


def test_all_are_there():
    assert {path.stem for path in CONFIGS} == set(PROCESSES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_them(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert (config.num_machines == 2) == (path.stem == "two_nodes")
