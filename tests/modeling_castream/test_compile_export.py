"""CAStream models under torch.compile and torch.export, in half precision, copied, and shared by threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from modeling_castream import CAStreamForImageClassification
from modeling_castream.backbone_castream import _captured
from tests.modeling_castream.tiny import CONFIGS, tiny_model

# Where the authors' ConvNeXt streams read; two of the four places are inside of a stage.
OFFICIAL_CONVNEXT = ["stem", "encoder.stages.1.downsampling_layer", "encoder.stages.2.downsampling_layer", "stage4"]
RESNET_SUBMODULES = ["embedder.pooler", "encoder.stages.1", "stage4"]
MODELS = {
    **{kind: lambda kind=kind: tiny_model(kind) for kind in CONFIGS if kind != "vit"},
    "official_convnext": lambda: tiny_model("convnext", stream_layers=OFFICIAL_CONVNEXT),
    "evidence": lambda: tiny_model(
        "resnet", evidence_queries=["memory", "constant"], unit_keys=True, preserve_norm=True
    ),
    "resnet_submodules": lambda: tiny_model("resnet", stream_layers=RESNET_SUBMODULES),
}


# Tracing takes seconds: the quick tier traces one network of each library, hooks and evidence.
QUICK = ("official_convnext", "timm", "evidence")
TRACED = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in sorted(MODELS)]


@pytest.fixture(params=sorted(MODELS))
def model(request) -> CAStreamForImageClassification:
    return MODELS[request.param]()


def images(batch_size: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_equal_outputs(actual, expected) -> None:
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.attention_maps, expected.attention_maps)
    torch.testing.assert_close(actual.evidence_map, expected.evidence_map)


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("pooling", ["ca", pytest.param("gap", marks=pytest.mark.slow)])
def test_compile_has_no_graph_breaks(kind, pooling):
    torch.compiler.reset()
    model = MODELS[kind]()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_equal_outputs(compiled(images(), pooling=pooling), model(images(), pooling=pooling))


@pytest.mark.slow
def test_a_compiled_training_step_has_the_same_gradients():
    torch.compiler.reset()
    model = MODELS["official_convnext"]().train()
    gradients = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        network(images(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {
        name for name, _ in model.named_parameters() if not name.startswith("castream.backbone")
    }
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK)
def test_inductor_computes_the_same(kind):
    torch.compiler.reset()
    model = MODELS[kind]()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_equal_outputs(compiled(images()), model(images()))


@pytest.mark.parametrize("kind", TRACED)
def test_export_takes_any_batch_and_image_size(kind):
    model = MODELS[kind]()
    exported = torch.export.export(
        model,
        (),
        {"pixel_values": images(2, 64, 96)},
        dynamic_shapes={"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)},
        strict=False,
    )
    for shape in ((2, 64, 96), (3, 96, 64), (5, 72, 128)):
        with torch.no_grad():
            assert_equal_outputs(exported.module()(pixel_values=images(*shape)), model(images(*shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(model, dtype, tmp_path):
    model.save_pretrained(tmp_path / "full")
    half = CAStreamForImageClassification.from_pretrained(tmp_path / "full", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    again = CAStreamForImageClassification.from_pretrained(tmp_path / "half")  # in the precision it was saved in
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    with torch.no_grad():
        expected, actual, reloaded = (network(images().to(network.dtype)) for network in (model, half, again))
    assert actual.logits.dtype == actual.attention_maps[-1].dtype == dtype
    assert torch.equal(actual.logits, reloaded.logits)
    error = (actual.logits.float() - expected.logits).abs().max() / expected.logits.abs().max()
    assert error < 0.05
    sums = actual.attention_maps[-1].float().sum((2, 3))
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=0.02)


def test_loading_by_device_map(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = CAStreamForImageClassification.from_pretrained(tmp_path, device_map="cpu")
    with torch.no_grad():
        assert_equal_outputs(loaded(images()), model(images()))


def test_construction_on_the_meta_device(model):
    config = copy.deepcopy(model.config)
    config.stream_channels = None
    with torch.device("meta"):
        empty = CAStreamForImageClassification(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert config.stream_channels == model.config.stream_channels
    assert empty.state_dict().keys() == model.state_dict().keys()


def check_copy(model, twin) -> None:
    with torch.no_grad():
        expected = model(images())
        assert_equal_outputs(twin(images()), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert_equal_outputs(model(images()), expected)


def test_a_deep_copy_is_whole_and_its_own(model):
    check_copy(model, copy.deepcopy(model))


@pytest.mark.parametrize("kind", ["resnet_submodules", "timm"])  # transformers' ConvNeXt cannot be pickled by itself
def test_a_pickled_model_is_whole_and_its_own(kind):
    model = MODELS[kind]()
    check_copy(model, pickle.loads(pickle.dumps(model)))


def test_threads_share_a_model():
    model = MODELS["official_convnext"]()
    batches = [images(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    barrier = Barrier(len(batches))

    def run(index: int) -> list:
        barrier.wait()
        with torch.no_grad():
            return [model(batches[index]) for _ in range(10)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for index, outputs in enumerate(pool.map(run, range(len(batches)))):
            for output in outputs:
                assert_equal_outputs(output, expected[index])


def test_a_pass_leaves_no_hooks_and_no_maps_behind():
    model = MODELS["resnet_submodules"]()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert sum(hooks) == 2
    for _ in range(20):
        model(images())
    with pytest.raises(RuntimeError):
        model(images().to(torch.float64))  # breaks off inside of the backbone
    assert _captured.get() is None
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
