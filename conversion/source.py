"""What a conversion starts from: a classifier, its preprocessing, and the description of its CA-Stream counterpart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

# Where the parts of a CAStreamForImageClassification live in its state_dict.
BACKBONE = "castream.backbone."
NECK = "castream.neck."
HEAD = "head."
CLASSIFIER = "classifier."

# (pattern, replacement or replacements): see mapping.rename
Rules = list[tuple[str, str | tuple[str, ...]]]


@dataclass
class Source:
    """A pretrained classifier, ready to be converted.

    Args:
        family: name of the table's row, e.g. `"transformers resnet"`.
        model: the classifier in eval mode, float32.
        config: fields of the CAStreamConfig that describes the same network.
        rules: ordered table from the classifier's state_dict names to CAStreamForImageClassification's.
        image_processor: what the converted model's folder gets.
        transform: the classifier's own preprocessing, list of RGB images -> (batch_size, 3, height, width).
        arguments: what the classifier takes for such a batch.
        state: its weights by name, in the form the converted model takes; None: `model.state_dict()`.
        taken: which weights of a file these are, where there is one.
    """

    family: str
    model: nn.Module
    config: dict
    rules: Rules
    image_processor: BaseImageProcessor
    transform: Callable[[list[Image.Image]], torch.Tensor]
    arguments: Callable[[torch.Tensor], tuple] = lambda pixel_values: (pixel_values,)
    state: dict[str, torch.Tensor] | None = None
    taken: str | None = None

    def __post_init__(self):
        self.state = self.model.state_dict() if self.state is None else self.state

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores (batch_size, num_labels) of the classifier."""
        with torch.no_grad():
            output = self.model(*self.arguments(pixel_values))
        return output if isinstance(output, torch.Tensor) else output[0]  # PP-LCNet calls them last_hidden_state
