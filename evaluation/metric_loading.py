"""Load one of the project's metrics by name, offline and from any working directory."""

import uuid
from pathlib import Path

import evaluate

METRICS_FOLDER = Path(__file__).resolve().parent / "metrics"


def metric_names() -> list[str]:
    """Names of the metrics beside this file, sorted."""
    return sorted(folder.name for folder in METRICS_FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())


def load_metric(name: str) -> evaluate.Metric:
    """The `evaluate.Metric` called `name`.

    It is loaded by absolute path, since a bare name makes `evaluate` look in the working directory and then on the Hub.
    Its numbers stay in memory under an experiment id of their own, so that runs that share a cache folder cannot meet
    in one file. With several processes, gather the numbers and use the metric on one of them.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in metric_names():
        raise ValueError(f"name={name!r}: there is no such metric, choose one of {', '.join(metric_names())}")
    return evaluate.load(str(METRICS_FOLDER / name), keep_in_memory=True, experiment_id=uuid.uuid4().hex)
