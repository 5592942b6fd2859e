"""Weights under their new names, every one of them, and nothing else."""

import re

import torch
from torch import nn

from .source import Rules

# Where the stream's weights live in a CAStreamForImageClassification's state_dict.
STREAM = "castream.stream."


def rename(names: list[str], rules: Rules, targets: set[str]) -> dict[str, list[str]]:
    """Find the new names of a classifier's weights.

    Args:
        names: names in the source's state_dict.
        rules: tried in order; the first whose pattern is found in a name and whose replacements are `targets` counts.
            Several replacements: the weight goes to each of them.
        targets: the names that the weights have to take, each once.

    Returns:
        For each source name its new names.

    Raises:
        ValueError: on a name without a new name, two names with the same, or a target without a name.
    """
    renamed = {}
    for name in names:
        for pattern, replacements in rules:
            replacements = (replacements,) if isinstance(replacements, str) else replacements
            candidates = [re.sub(pattern, replacement, name, count=1) for replacement in replacements]
            if re.search(pattern, name) and targets.issuperset(candidates):
                renamed[name] = candidates
                break
    used = [candidate for candidates in renamed.values() for candidate in candidates]
    problems = {
        "without a counterpart in the converted model": [name for name in names if name not in renamed],
        "of the converted model without a source": sorted(targets.difference(used)),
        "of the converted model with two sources": sorted({name for name in used if used.count(name) > 1}),
    }
    for problem, found in problems.items():
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"{len(found)} weights {problem}: {', '.join(found[:3])}{more}.")
    return renamed


def load_renamed(model: nn.Module, state: dict[str, torch.Tensor], renamed: dict[str, list[str]]) -> None:
    """Load a source's weights into a converted model, strictly.

    Raises:
        ValueError: on a weight of another shape, apart from axes of length 1: a 1x1 convolution of a pooled vector is a
            linear map.
    """
    target = model.state_dict()
    for name, candidates in renamed.items():
        for candidate in candidates:
            shape = target[candidate].shape
            if [size for size in shape if size != 1] != [size for size in state[name].shape if size != 1]:
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, {tuple(shape)} was expected.")
            target[candidate] = state[name].reshape(shape)
    model.load_state_dict(target, strict=True)
