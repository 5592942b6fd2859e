"""python -m benchmarks.coverage: convert one classifier of every kind, and print what came of it.

The weights are a network's own random ones, with biases, scales and normalisation statistics off their trivial values,
so that a layer left out or a wrong epsilon shows. Of timm, the smallest network of each class and pooling, if it has at
most `--parameters`; with `--all`, every network up to that size. The table names those that are exact and their largest
difference of logits, and those that are refused and why; the last line counts timm's names that average by class. It
takes about a quarter of an hour on one core.
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

_LARGEST_SIDE = 448  # of the images of networks of any size, of which some are published for 768 pixels
_CLASSES = 7  # also of those that timm publishes without a classifier


@dataclass(frozen=True)
class Outcome:
    """What came of a conversion: the largest difference of logits, relative to the largest logit, or why there is
    none."""

    difference: float | None
    reason: str = ""


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
                model = timm.create_model(name, num_classes=_CLASSES)
            except Exception:  # a network that computes with its weights when it is made
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
    model = timm.create_model(name, num_classes=_CLASSES)
    size = model.pretrained_cfg["input_size"][-1]
    if not model.pretrained_cfg.get("fixed_input_size"):
        size = min(size, _LARGEST_SIDE)
        model.pretrained_cfg["input_size"] = (3, size, size)
    return write_classifier(describe(randomise(model, size), {}, f"timm:{name}"), folder / "converted")


def try_row(row: str, folder: Path) -> Parity:
    """Convert one of `random_networks.ROWS`; see `try_timm`."""
    source = load_source(*write_random_source(row, folder / "source"))
    return write_classifier(source, folder / "converted")


def outcome(attempt: Callable[[str, Path], Parity], name: str) -> Outcome:
    """What came of an attempt to convert a network."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parity = attempt(name, Path(folder))
        except ValueError as error:
            return Outcome(None, f"refused: {' '.join(str(error).removeprefix(f'timm:{name} ').split())}")
        except Exception as error:  # a network that breaks by itself
            return Outcome(None, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return Outcome(parity.logits / parity.largest_logit)


def attempts(networks: list[Network], largest: float) -> Iterator[tuple[str, str, str, Callable]]:
    """What is tried: its kind, what the table calls it, its name, and how."""
    for library, names in (("torchvision", TORCHVISION), ("transformers", TRANSFORMERS)):
        for name in names:
            yield library, name, f"{library}:{name}", try_row
    for network in networks:
        if network.size <= largest:
            yield f"timm, pooling {network.pooling}", f"{network.family} ({network.name})", network.name, try_timm


def table(tried: list[tuple[str, str, Outcome]]) -> str:
    """A row for each kind and outcome, of (kind, name, outcome)."""
    groups: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for kind, name, found in tried:
        groups.setdefault((kind, found.reason), []).append((name, found.difference))
    lines = ["| kind | networks | difference of the largest logit, or reason |", "| --- | --- | --- |"]
    for (kind, reason), members in groups.items():
        what = reason or f"exact: at most {max(difference for _, difference in members):.0e}"
        lines.append(f"| {kind} | {'; '.join(name for name, _ in members)} | {what} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--parameters", type=float, default=500e6, help="of the largest timm network (default: 500e6)")
    parser.add_argument("--all", action="store_true", help="every timm network up to that size, not one per class")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    networks = list(timm_networks())
    chosen = networks if arguments.all else smallest_of_each_kind(networks)
    tried, exact = [], set()
    for kind, name, source, attempt in attempts(chosen, arguments.parameters):
        found = outcome(attempt, source)
        tried.append((kind, name, found))
        exact |= {network.kind for network in chosen if network.name == source and not found.reason}
        print(f"{kind}: {name}: {found.reason or found.difference}", file=sys.stderr, flush=True)
    averaging = [network.kind in exact for network in networks if network.pooling in AVERAGES]
    print(f"{table(tried)}\n\n{sum(averaging)} of timm's {len(averaging)} names that average are of an exact class.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
