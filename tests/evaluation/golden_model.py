"""The reference's ResNet-18 with a stream, ten classes, weights by formula: its names, and ours."""

import re

import torch
from transformers import ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.reference import formula

RULES = (  # ours -> the reference's, first match; torchvision's names, and cls_token, base, l1 .. l4 for the stream
    (r"castream\.backbone\.embedder\.embedder\.convolution\.", "conv1."),
    (r"castream\.backbone\.embedder\.embedder\.normalization\.", "bn1."),
    (r"castream\.backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.convolution\.", "layer{0}.{1}.downsample.0."),
    (
        r"castream\.backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.normalization\.",
        "layer{0}.{1}.downsample.1.",
    ),
    (r"castream\.backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.convolution\.", "layer{0}.{1}.conv{2}."),
    (r"castream\.backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.normalization\.", "layer{0}.{1}.bn{2}."),
    (r"castream\.stream\.query$", "cls_token"),
    (r"castream\.stream\.blocks\.0\.projection\.", "base.to_out.1."),
    (r"castream\.stream\.blocks\.(\d)\.projection\.", "l{0}.to_out.1."),
    (r"classifier\.", "fc."),
)


def reference_name(name: str) -> str:
    """The reference's name of one of our parameters."""
    for pattern, template in RULES:
        found = re.match(pattern, name)
        if found:
            numbers = [int(number) for number in found.groups()]
            if (
                numbers and "blocks" not in pattern
            ):  # stages and layers count from 1 there, blocks within a stage from 0
                numbers = [number + (place != 1) for place, number in enumerate(numbers)]
            return template.format(*numbers) + name[found.end() :]
    raise KeyError(name)


def golden_model() -> CAStreamForImageClassification:
    """Both reference models in one: `pooling="ca"` is the stream's, `pooling="gap"` the plain one's."""
    backbone = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=backbone, num_labels=10)).eval()
    weights = {
        name: torch.from_numpy(formula.formula_array(reference_name(name), tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    return model
