"""python -m castream.conversion.coverage: convert one classifier of every kind, and print what came of it.

The weights are a network's own random ones, with biases, scales and normalisation statistics off their trivial values,
so that a layer left out or a wrong epsilon shows. Of timm, the smallest network of each class that has one of at most
`--parameters`; with `--all`, every network up to that size. A row tells the largest difference of logits, or why the
network is refused.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from transformers.utils import logging

from .classifier import write_classifier
from .random_sources import TORCHVISION, TRANSFORMERS, randomise, write_random_source
from .timm_sources import describe, pooling_kind


def timm_networks(largest: int) -> Iterator[tuple[str, int, str, str | None]]:
    """Name, number of parameters, class and pooling of timm's classifiers of at most `largest` parameters."""
    for name in timm.list_models():
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # a few networks compute with their weights when they are made
                continue
        count = sum(parameter.numel() for parameter in model.parameters())
        if count <= largest and model.num_classes:
            yield name, count, type(model).__name__, pooling_kind(model)


def smallest_of_each_class(networks: list[tuple]) -> list[tuple]:
    """The smallest network of each class and pooling."""
    found = {}
    for network in sorted(networks, key=lambda network: network[1]):
        found.setdefault(network[2:], network)
    return sorted(found.values(), key=lambda network: network[2])


def _try_timm(name: str, folder: Path) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    size = model.pretrained_cfg["input_size"][-1]
    parity = write_classifier(describe(randomise(model, size), {}, f"timm:{name}"), folder)
    return f"{parity.logits:.1e} of {parity.largest_logit:.3g}"


def _try_row(row: str, folder: Path) -> str:
    from .classifier import load_source

    source = load_source(*write_random_source(row, folder / "source"))
    parity = write_classifier(source, folder / "converted")
    return f"{parity.logits:.1e} of {parity.largest_logit:.3g}"


def outcome(attempt, *arguments) -> str:
    """What a conversion measured, or the reason of its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return attempt(*arguments, Path(folder) / "converted")
        except ValueError as error:
            return f"refused: {' '.join(str(error).split())}"
        except Exception as error:  # a network that breaks by itself
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m castream.conversion.coverage", description=__doc__)
    parser.add_argument("--parameters", type=float, default=60e6, help="of the largest timm network (default: 60e6)")
    parser.add_argument("--all", action="store_true", help="every timm network up to that size, not one per class")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    networks = list(timm_networks(arguments.parameters))
    chosen = networks if arguments.all else smallest_of_each_class(networks)
    print("| source | largest logit difference, of largest logit; or why it is refused |\n| --- | --- |")
    for row in (*(f"transformers:{name}" for name in TRANSFORMERS), *(f"torchvision:{name}" for name in TORCHVISION)):
        print(f"| {row} | {outcome(_try_row, row)} |", flush=True)
    for name, _, family, kind in chosen:
        alike = sum(network[2:] == (family, kind) for network in networks)
        print(f"| timm {family}, {kind}: {name} and {alike - 1} more | {outcome(_try_timm, name)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
