"""Networks of one and four channels: evaluated as a network of three channels that computes the same."""

import numpy as np
import pandas as pd
import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.data import Preprocessor, prepare_block
from transformers import BitImageProcessor

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.evaluation.small import SIZE, small_examples, small_image
from tests.modeling_castream.tiny import tiny_model, tiny_resnet


def processor(channels: int) -> BitImageProcessor:
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    scale = {"image_mean": [0.4, 0.5, 0.6, 0.7][:channels], "image_std": [0.25] * channels}
    if channels == 1:
        scale = {"image_mean": [0.5], "image_std": [0.25]}
    return BitImageProcessor(**sizes, **scale, do_convert_rgb=channels == 3)


def networks(channels: int):
    """A network of three channels, and one of `channels` that computes the same: of grey photos if it is one.

    In float64: rounding would exchange pixels in the order in which they enter or leave an image.
    """
    rgb = tiny_model().double()
    config = CAStreamConfig(backbone_config=tiny_resnet(num_channels=channels), num_labels=5)
    other = CAStreamForImageClassification(config).eval().double()
    state = rgb.state_dict()
    name = next(key for key, value in state.items() if value.ndim == 4 and value.shape[1] == 3)
    weight = state[name]
    state[name] = weight.sum(1, keepdim=True) if channels == 1 else torch.cat([weight, 0 * weight[:, :1]], 1)
    other.load_state_dict(state)
    return rgb, other


def grey(examples: list[dict]) -> list[dict]:
    return [row | {"image": row["image"].convert("L").convert("RGB")} for row in examples]


@pytest.mark.parametrize("channels", [1, 4])
def test_pixels_and_masks_come_in_the_channels_of_the_network(channels):
    preprocessor = Preprocessor(processor(channels), channels)
    np.testing.assert_allclose(preprocessor.mean, processor(channels).image_mean, atol=1e-6)
    np.testing.assert_allclose(preprocessor.std, processor(channels).image_std, atol=1e-6)
    row = {"index": 0, "image": small_image(0, (80, SIZE)), "mask": np.zeros((SIZE, 80), bool)}
    row["mask"][5:30, 8:33] = True
    block = prepare_block(0, [row], preprocessor, num_labels=5)
    pixels = np.asarray(row["image"].convert({1: "L", 4: "RGBA"}[channels]), np.float32).reshape(SIZE, 80, channels)
    np.testing.assert_allclose(block.images[0].permute(1, 2, 0), pixels[:, 8 : 8 + SIZE] / 255, atol=1e-6)
    rgb = prepare_block(0, [row], Preprocessor(processor(3)), num_labels=5)
    assert torch.equal(block.masks[0], rgb.masks[0]) and torch.equal(
        block.masks[0], torch.as_tensor(row["mask"][:, 8:72])
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_the_table_is_that_of_the_same_network_of_three_channels(channels):
    rgb, other = networks(channels)
    examples = small_examples(6)
    rgb_processor = processor(3)
    if channels == 1:
        examples = grey(examples)
        rgb_processor.image_mean = [0.5] * 3
    settings = EvaluationSettings(methods=("grad_cam", "raw_attention"), num_examples=2)
    expected = evaluate_saliency(rgb, rgb_processor, examples, settings)
    found = evaluate_saliency(other, processor(channels), examples, settings)
    wanted, table = expected.per_image, found.per_image
    assert table["average_gain"].notna().any() and table["insertion"].notna().any()
    for column in table.columns:
        if pd.api.types.is_numeric_dtype(table[column]):
            np.testing.assert_allclose(table[column], wanted[column], atol=2e-3, rtol=1e-4, err_msg=column)
    for index, arrays in found.examples.items():
        assert arrays["image"].shape == (SIZE, SIZE, 3)
        assert np.array_equal(arrays["image"], expected.examples[index]["image"])
