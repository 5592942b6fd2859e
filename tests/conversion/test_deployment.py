"""Converted models compiled, exported, in ONNX, in low precision and quantised."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from castream.conversion import convert_classifier
from castream.conversion.command import main
from castream.conversion.official import convert_official
from castream.conversion.onnx_export import LogitsAndAttention, export_onnx
from PIL import Image
from transformers import ConvNextConfig, ResNetConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.conversion.research_network import research_state

INSIDE_STAGES = {"stream_layers": ["stem", "encoder.stages.1.downsampling_layer", "stage2"]}
# small networks; in the slow tier a converted one, and the authors' networks whose streams read inside of stages
MODELS = [
    "resnet",
    "convnext",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "timm:mobilenetv4_conv_small",
            "torchvision:mobilenet_v3_small",
            "convnext_tiny_stream",
            "efficientnet_b0_stream",
        )
    ),
]

ONNX = ("efficientnet", "focalnet", "hgnet_v2", "hiera", "mobilenet_v1", "mobilenet_v2", "poolformer", "pp_lcnet")
ONNX += ("pvt_v2", "regnet", "segformer", "textnet")


def _small_model(name: str) -> CAStreamForImageClassification:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_channels": 3}
    if name == "resnet":
        backbone, options = ResNetConfig(embedding_size=8, layer_type="basic", **sizes), {"num_attention_heads": 2}
    else:
        backbone, options = ConvNextConfig(num_stages=2, **sizes), INSIDE_STAGES
    torch.manual_seed(0)
    return CAStreamForImageClassification(
        CAStreamConfig(backbone_config=backbone, num_labels=5, init="reference", **options)
    )


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A saved model whose queries and projections are not zero, so that its attention depends on the image."""
    name, saved = request.param, tmp_path_factory.mktemp("model")
    if ":" in name:
        model = CAStreamForImageClassification.from_pretrained(request.getfixturevalue("convert_row")(name).folder)
        with torch.no_grad():
            for parameter in model.castream.stream.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    elif name.endswith("_stream"):
        gain = 1.68 if name.startswith("efficientnet") else 1.0
        torch.save(research_state(name, conv_gain=gain), saved / "weights.pth")
        model, _ = convert_official(saved / "weights.pth", name)
    else:
        model = _small_model(name)
    model.save_pretrained(saved)
    return saved


@pytest.fixture
def model(folder):
    return CAStreamForImageClassification.from_pretrained(folder)


def test_the_onnx_file_of_a_model_with_evidence_gives_its_map(tmp_path):
    backbone = ResNetConfig(hidden_sizes=[8, 16], depths=[1, 2], embedding_size=8, layer_type="basic")
    torch.manual_seed(0)
    model = CAStreamForImageClassification(
        CAStreamConfig(backbone_config=backbone, num_labels=5, evidence_queries=["memory"])
    ).eval()
    model.save_pretrained(tmp_path / "model")
    assert export_onnx(tmp_path / "model", tmp_path / "model.onnx") <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "attention", "evidence"]
    pixel_values = random_pixels(3, 3, 96, 128)
    with torch.no_grad():
        expected = model(pixel_values).evidence_map
    [evidence] = session.run(["evidence"], {"pixel_values": pixel_values.numpy()})
    assert evidence.shape == expected.shape == (3, 24, 32) and close(evidence, expected, 1e-5)


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(actual, expected, tolerance=1e-4) -> bool:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    return (actual - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_compiles_without_graph_breaks(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixel_values = random_pixels(2, 3, 64, 96)
    expected, out = model(pixel_values), compiled(pixel_values)
    assert close(out.logits, expected.logits, 1e-5)
    assert close(out.attention_maps[0], expected.attention_maps[0], 1e-5)


@torch.no_grad()
def test_exports_with_free_batch_and_size(model):
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    module = LogitsAndAttention(model)
    program = torch.export.export(module, (random_pixels(2, 3, 64, 96),), dynamic_shapes=(dynamic,), strict=False)
    for shape in ((1, 3, 96, 64), (3, 3, 128, 160)):
        pixel_values = random_pixels(*shape)
        for actual, expected in zip(program.module()(pixel_values), module(pixel_values), strict=True):
            assert close(actual, expected, 1e-5)


@torch.no_grad()
def test_onnx_command(model, folder, tmp_path, capsys):
    assert main(["onnx", "--model", str(folder), "--output", str(tmp_path / "model.onnx")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # one file, weights and all
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits", "attention"]
    pixel_values = random_pixels(3, 3, 128, 96)
    logits, attention = session.run(["logits", "attention"], {"pixel_values": pixel_values.numpy()})
    out = model(pixel_values)
    assert close(logits, out.logits) and close(attention, out.attention_maps[-1])
    assert np.allclose(attention.sum((2, 3)), 1, atol=1e-5)


def test_a_wrong_onnx_file_gets_no_name(tmp_path, monkeypatch):
    _small_model("resnet").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("castream.conversion.onnx_export._largest_difference", lambda *args: float("nan"))
    with pytest.raises(ValueError, match="onnxruntime's outputs differ by nan"):
        export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_onnx_of_a_network_made_for_one_size(convert_row, tmp_path, capsys):
    folder, output = str(convert_row("transformers:swin").folder), str(tmp_path / "model.onnx")
    command = ["onnx", "--model", folder, "--output", output]
    capsys.readouterr()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--fixed-size" in err and list(tmp_path.iterdir()) == []
    assert main([*command, "--fixed-size"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits, _ = session.run(["logits", "attention"], {"pixel_values": random_pixels(3, 3, 64, 64).numpy()})
    assert logits.shape == (3, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
def test_onnx_of_types(convert_row, tmp_path, name):
    """onnxruntime's outputs are compared with PyTorch's before the file gets its name."""
    assert export_onnx(convert_row(f"transformers:{name}").folder, tmp_path / "model.onnx", fixed_size=True) <= 1e-4
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_onnx_of_no_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["onnx", "--model", str(tmp_path / "empty"), "--output", str(tmp_path / "model.onnx")]) == 2
    err = capsys.readouterr().err
    assert "empty does not load" in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_weights_load_and_run(model, folder, dtype):
    half = CAStreamForImageClassification.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    pixel_values = random_pixels(2, 3, 64, 64)
    out = half(pixel_values.to(dtype))
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    attention = out.attention_maps[-1].float()
    assert torch.allclose(attention.sum((2, 3)), torch.ones(2, attention.shape[1]), atol=0.02)


def _quantised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with all Linear layers in int8, scaled anew for every batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own quantiser is deprecated; others need another package
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@torch.no_grad()
def test_int8_linear_layers_keep_the_prediction(imagenet_sample):
    """EfficientNet-Lite0 on photos, through either pooling: no more than 1 in 25 predictions may change."""
    model, processor = convert_classifier("pypi:efficientnet-lite0")
    quantised = _quantised(model)
    assert type(quantised.classifier).__module__.startswith("torch.ao.nn.quantized")
    photos = [Image.open(path).convert("RGB") for path in sorted(imagenet_sample.glob("*/*.jpg"))[::20]]
    agree = []
    for start in range(0, len(photos), 10):
        pixel_values = processor(photos[start : start + 10], return_tensors="pt")["pixel_values"]
        for pooling in ("ca", "gap"):
            expected, actual = (each(pixel_values, pooling=pooling).logits for each in (model, quantised))
            agree += (expected.argmax(-1) == actual.argmax(-1)).tolist()
    assert sum(agree) >= 0.96 * len(agree)
