"""Folders of timm classifiers as they were first published: a backbone of stages, and layers described around it."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from modeling_castream import CAStreamForImageClassification

BACKBONE = "castream.backbone._backbone."
NETWORKS = {  # fields of config.json, and where the network's weights went
    "tf_efficientnet_lite0": (
        {
            "backbone_config": {"out_indices": [0, 1, 2, 3, 4]},
            "neck_layers": [
                {"type": "conv", "out_channels": 1280, "bias": False},
                {"type": "batch_norm", "eps": 1e-3},
                {"type": "activation", "function": "relu6"},
            ],
            "head_layers": [],
            "stream_layers": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "neck"],
            "stream_channels": [16, 24, 40, 112, 1280],
        },
        [
            (r"^conv_head\.", "castream.neck.0."),
            (r"^bn2\.", "castream.neck.1."),
            (r"^classifier\.", "classifier."),
            (r"^", BACKBONE),
        ],
    ),
    "convnext_atto": (
        {
            "backbone_config": {"out_indices": [0, 1, 2, 3]},
            "neck_layers": [],
            "head_layers": [{"type": "layer_norm", "eps": 1e-6}],
            "stream_layers": ["stages.0", "stages.1", "stages.2", "stages.3"],
            "stream_channels": [40, 80, 160, 320],
        },
        [
            (r"^head\.norm\.", "head.0."),
            (r"^head\.fc\.", "classifier."),
            (r"^(stem|stages)\.(\d)\.", rf"{BACKBONE}\1_\2."),
        ],
    ),
}


def write_folder(name: str, folder) -> torch.nn.Module:
    """Write the folder of a network with random weights, and return the network."""
    fields, rules = NETWORKS[name]
    source = timm.create_model(name, num_classes=7).eval()
    state = {}
    for key, value in source.state_dict().items():
        pattern, replacement = next(rule for rule in rules if re.search(rule[0], key))
        state[re.sub(pattern, replacement, key, count=1)] = value.clone()
    channels = fields["stream_channels"]
    state["castream.stream.query"] = torch.zeros(1, channels[0])
    for index, (num_channels, after) in enumerate(zip(channels, [*channels[1:], channels[-1]], strict=True)):
        last = index == len(channels) - 1
        weight = torch.eye(num_channels) if last else torch.zeros(after, num_channels)
        state[f"castream.stream.blocks.{index}.projection.weight"] = weight
        state[f"castream.stream.blocks.{index}.projection.bias"] = torch.zeros(after)
    backbone = {"model_type": "timm_backbone", "backbone": name, **fields["backbone_config"]}
    names = [f"class {index}" for index in range(7)]
    config = {"model_type": "castream", **fields, "backbone_config": backbone, "id2label": dict(enumerate(names))}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_earlier_folder_loads_and_is_its_source(name, tmp_path):
    torch.manual_seed(0)
    source = write_folder(name, tmp_path / "earlier")
    model, info = CAStreamForImageClassification.from_pretrained(tmp_path / "earlier", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = source(pixel_values)
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    for pooling in ("gap", "ca"):
        assert (model(pixel_values, pooling=pooling).logits - expected).abs().max() <= bound, pooling
