"""Checkpoints of the authors' code, converted: their own numbers, their file forms, and what must be refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from castream.conversion import official
from castream.conversion.mapping import rename
from castream.conversion.official import ARCHITECTURES, convert_official, write_official
from castream.conversion.torchvision_sources import classifier_of, network_config

from modeling_castream import CAStreamForImageClassification
from tests.conversion.research_network import research_shapes, research_state
from tests.reference import formula

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "reference" / "models_public.npz")
CASES = {  # architecture, options of the network
    "resnet18_stream": ("resnet18_stream", {}),
    "resnet18_final_project": ("resnet18_final", {}),
    "resnet18_final_noproject": ("resnet18_final", {"project": False}),
    "convnext_tiny_stream": ("convnext_tiny_stream", {}),
    "efficientnet_b0_stream": ("efficientnet_b0_stream", {"conv_gain": 1.68}),
}
PARAMETERS = {
    "resnet18_stream": 12_129_320,
    "resnet50_stream": 32_526_184,
    "convnext_small_stream": 51_202_792,
    "convnext_base_stream": 90_331_112,
    "efficientnet_b0_stream": 7_436_884,
}


def close(actual: torch.Tensor, expected: np.ndarray) -> bool:
    return np.allclose(actual.numpy(), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory):
    """A case's name, and its model after a trip through the disk."""
    architecture, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("official")
    torch.save(research_state(architecture, **options), folder / "weights.pth")
    write_official(folder / "weights.pth", architecture, folder / "converted")
    return request.param, CAStreamForImageClassification.from_pretrained(folder / "converted")


@torch.no_grad()
def test_golden_numbers(converted):
    case, model = converted
    tokens = []
    for block in model.castream.stream.blocks:
        block.register_forward_hook(lambda module, args, output: tokens.append(output[0].squeeze(1)))
    out = model(torch.from_numpy(formula.pixels(case, (2, 3, 64, 64))))
    assert close(out.logits, REFERENCE[f"{case}.logits"])
    assert len(tokens) == len(out.attention_maps) == sum(key.startswith(f"{case}.cls.") for key in REFERENCE.files)
    for index, (token, attention) in enumerate(zip(tokens, out.attention_maps, strict=True)):
        assert close(token, REFERENCE[f"{case}.cls.{index}"]), index
        scores = torch.from_numpy(REFERENCE[f"{case}.dots.{index}"])
        expected = scores.flatten(2).softmax(-1).reshape(scores.shape)
        assert attention.shape == expected.shape
        assert close(attention, expected.numpy()), index


@torch.no_grad()
def test_the_gap_path_is_the_plain_network(converted):
    """torchvision's network with the same names has the same values: formula weights depend on the names only."""
    import torchvision

    case, model = converted
    if not case.endswith("_stream"):
        pytest.skip("the final variant's convolutions have names, hence values, of their own")
    plain = torchvision.models.get_model(case.removesuffix("_stream"), num_classes=10)
    gain = CASES[case][1].get("conv_gain", 1.0)
    state = {name: formula.formula_array(name, value.shape, gain) for name, value in plain.state_dict().items()}
    plain.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    pixel_values = torch.from_numpy(formula.pixels(case, (2, 3, 64, 64)))
    expected = plain.eval()(pixel_values)
    assert torch.allclose(model(pixel_values, pooling="gap").logits, expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in (*PARAMETERS, "resnet18_final") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_every_weight_of_every_architecture_has_its_place(architecture):
    """Names and shapes on the meta device, where the largest networks cost nothing."""
    network, _, variant = architecture.rpartition("_")
    classifier, _ = classifier_of(network_config(network))
    for project in (True, False) if variant == "final" else (True,):
        shapes = research_shapes(architecture, num_classes=1000, project=project)
        with torch.device("meta"):
            state = {name.replace("confinal.", "conv1."): torch.empty(shape) for name, shape in shapes.items()}
            model = CAStreamForImageClassification(official._config(architecture, classifier, state, 1))
        target = model.state_dict()
        renamed = rename(list(state), official._rules(network, variant, classifier), set(target))
        for name, [new_name] in renamed.items():
            assert target[new_name].numel() == state[name].numel(), (name, new_name)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == sum(np.prod(shape) for name, shape in shapes.items() if "running" not in name and shape)
        assert count == PARAMETERS.get(architecture, count)
        assert model.config.id2label[0] == "tench, Tinca tinca"


@torch.no_grad()
def test_file_forms_and_heads(tmp_path):
    """A parallel wrapper's prefix, the training script's dictionary, `model`, and the number of heads."""
    state = research_state("resnet18_stream")
    prefixed = {f"module.{name}": value for name, value in state.items()}
    forms = {
        "plain.pth": state,
        "prefixed.pth": prefixed,
        "checkpoint.pth": {"epoch": 3, "arch": "resnet18_stream", "state_dict": prefixed, "best_acc1": 70.0},
        "model.pth": {"model": state},
    }
    pixel_values = torch.from_numpy(formula.pixels("resnet18_stream", (2, 3, 64, 64)))
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        model, _ = convert_official(tmp_path / name, "resnet18_stream")
        assert close(model(pixel_values).logits, REFERENCE["resnet18_stream.logits"]), name
    model, _ = convert_official(tmp_path / "plain.pth", "resnet18_stream", num_attention_heads=4)
    out = model(pixel_values)
    assert [attention.shape[1] for attention in out.attention_maps] == [4] * 5
    assert not close(out.logits, REFERENCE["resnet18_stream.logits"])


def test_image_processor_is_that_of_the_frozen_weights(tmp_path):
    torch.save(research_state("efficientnet_b0_stream", conv_gain=1.68), tmp_path / "weights.pth")
    _, processor = convert_official(tmp_path / "weights.pth", "efficientnet_b0_stream")
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (256, 224, 3)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet34_stream", "without a source"),
        ("resnet50_stream", "does not fit resnet50_stream"),
        ("resnet18_final", "does not fit resnet18_final"),
        ("convnext_tiny_stream", r"it has no classifier\.2\.weight"),
        ("resnet18_strem", "must be one of"),
    ],
)
def test_wrong_architecture(tmp_path, architecture, message):
    torch.save(research_state("resnet18_stream"), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        convert_official(tmp_path / "weights.pth", architecture)


def test_wrong_classes_and_plain_networks(tmp_path):
    state = research_state("resnet18_stream")
    torch.save(state | {"fc.bias": torch.zeros(12)}, tmp_path / "classes.pth")
    with pytest.raises(ValueError, match=r"fc.bias has the shape \(12,\), \(10,\) was expected"):
        convert_official(tmp_path / "classes.pth", "resnet18_stream")
    del state["cls_token"]
    torch.save(state, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="no cls_token"):
        convert_official(tmp_path / "plain.pth", "resnet18_stream")
