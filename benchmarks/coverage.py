"""python -m benchmarks.coverage: convert one classifier of every kind, and print what came of it.

The weights are a network's own random ones, with biases, scales and normalisation statistics off their trivial values,
so that a layer left out or a wrong epsilon shows. Of timm, the smallest network of each class and pooling, if it has at
most `--parameters`; with `--all`, every network up to that size. A row tells the largest difference of logits, or why
the network is refused; the last line, how many of timm's names that average are of an exact class.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from castream.conversion.classifier import load_source, write_classifier
from castream.conversion.parity import Parity
from castream.conversion.timm_sources import describe, pooling_kind
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .random_networks import TORCHVISION, TRANSFORMERS, randomise, write_random_source

AVERAGES = ("avg", "fast", "avg token", None)  # timm's names of poolings that may be a mean over positions


@dataclass(frozen=True)
class Network:
    """One of timm's classifiers: its name, number of parameters, class, and timm's name of its pooling."""

    name: str
    size: int
    family: str
    pooling: str | None

    @property
    def kind(self) -> tuple[str, str]:
        return self.family, str(self.pooling)


def timm_networks() -> Iterator[Network]:
    """All of timm's classifiers that can be made without data."""
    for name in timm.list_models():
        with torch.device("meta"), no_init_weights():
            try:
                model = timm.create_model(name)
            except Exception:  # a few networks compute with their weights when they are made
                continue
        if model.num_classes:
            size = sum(parameter.numel() for parameter in model.parameters())
            yield Network(name, size, type(model).__name__, pooling_kind(model))


def smallest_of_each_kind(networks: list[Network]) -> list[Network]:
    """The smallest network of each class and pooling."""
    found = {}
    for network in sorted(networks, key=lambda network: network.size):
        found.setdefault(network.kind, network)
    return [found[kind] for kind in sorted(found)]


def try_timm(name: str, folder: Path) -> Parity:
    """Convert a network of timm with random weights and seven classes.

    Raises:
        ValueError: where it is refused.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    size = model.pretrained_cfg["input_size"][-1]
    return write_classifier(describe(randomise(model, size), {}, f"timm:{name}"), folder / "converted")


def try_row(row: str, folder: Path) -> Parity:
    """Convert one of `random_networks.ROWS`; see `try_timm`."""
    source = load_source(*write_random_source(row, folder / "source"))
    return write_classifier(source, folder / "converted")


def outcome(attempt: Callable[[str, Path], Parity], name: str) -> tuple[bool, str]:
    """Whether a conversion is exact; and what it measured, or the reason of its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parity = attempt(name, Path(folder))
        except ValueError as error:
            return False, f"refused: {' '.join(str(error).removeprefix(f'timm:{name} ').split())}"
        except Exception as error:  # a network that breaks by itself
            return False, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return True, f"{parity.logits:.1e} of {parity.largest_logit:.3g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--parameters", type=float, default=60e6, help="of the largest timm network (default: 60e6)")
    parser.add_argument("--all", action="store_true", help="every timm network up to that size, not one per class")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| kind | network | difference, or reason |\n| --- | --- | --- |")
    for library, names in (("torchvision", TORCHVISION), ("transformers", TRANSFORMERS)):
        for name in names:
            print(f"| {library} | {name} | {outcome(try_row, f'{library}:{name}')[1]} |", flush=True)
    networks = list(timm_networks())
    exact = set()
    for network in networks if arguments.all else smallest_of_each_kind(networks):
        if network.size <= arguments.parameters:
            is_exact, what = outcome(try_timm, network.name)
            exact |= {network.kind} if is_exact else set()
            alike = sum(other.kind == network.kind for other in networks)
            kind = f"timm {network.family}, pooling {network.pooling}"
            print(f"| {kind}, {alike} names | {network.name} | {what} |", flush=True)
    averaging = [network.kind in exact for network in networks if network.pooling in AVERAGES]
    print(f"\n{sum(averaging)} of timm's {len(averaging)} names that average are of an exact class.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
