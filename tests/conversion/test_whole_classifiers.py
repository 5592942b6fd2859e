"""Classifiers that are used as they are: what stands around their pooling, explanations, training, refusals."""

import pytest
import timm
import torch
from castream.conversion.classifier import load_source
from castream.conversion.timm_sources import describe
from timm.models import save_for_hf
from transformers import (
    CvtConfig,
    CvtForImageClassification,
    DinatConfig,
    DinatForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from benchmarks.random_networks import TRANSFORMERS
from modeling_castream import CAStreamForImageClassification, explain
from modeling_castream.methods_castream import METHODS as TABLE
from modeling_castream.network_castream import HEADS
from tests.modeling_castream.tiny import METHODS

WHOLE = [name for name in TRANSFORMERS if name.split(",")[0] in HEADS]


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_type_of_the_table_has_a_row():
    assert {name.split(",")[0] for name in WHOLE} == {name for name in HEADS if name.islower()}


HAS_ATTENTION = {"pvt": False, "cvt": False}  # their last blocks read patches that they have joined first


def methods_of(config, pooling: str) -> list[str]:
    """The saliency methods that exist for a model under a pooling."""
    reads_token = config.source_readout == "token" or config.classifier_cls_token
    positions = pooling == "ca" or config.source_pooling == "gap"
    methods = [name for name in METHODS if name != "score_cam" and (positions or not TABLE[name].needs_positions)]
    return methods + ["cls_attention"] * (reads_token and HAS_ATTENTION.get(config.backbone_config.model_type, True))


@pytest.mark.parametrize("row", [*(f"transformers:{name}" for name in TRANSFORMERS), "torchvision:mobilenet_v3_small"])
def test_explanations_and_a_training_step(convert_row, row):
    model = CAStreamForImageClassification.from_pretrained(convert_row(row).folder)
    assert len(model.config.stream_layers) > 1
    torch.manual_seed(0)
    for parameter in model.castream.stream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for pooling in ("source", "ca"):
        for method in methods_of(model.config, pooling):
            maps = explain(model, pixels(), 3, method, pooling, normalize=False, relu=False, upsample=False)
            assert maps.isfinite().all(), method
            assert maps[0].numel() == 1 or (maps.std((1, 2)) > 0).all(), (method, pooling)
    for parameter in model.castream.stream.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixels(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert f"castream.stream.blocks.{len(model.config.stream_layers) - 1}.projection.weight" in moved
    assert all(key.startswith("castream.stream.") for key in moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_score_cam(convert_row, name):
    model = CAStreamForImageClassification.from_pretrained(convert_row(f"transformers:{name}").folder)
    for pooling in ("source", "ca"):
        maps = explain(model, pixels(), 3, "score_cam", pooling, normalize=False, relu=False)
        assert maps.shape == (2, 64, 64) and maps.isfinite().all()


def test_dinat_does_not_run(tmp_path, monkeypatch):
    """What its refusal says of transformers, with functions that return what natten's do of (batch, heads, ...)."""
    config = DinatConfig(embed_dim=16, depths=[1], num_heads=[2], kernel_size=3, dilations=[[1]])
    module = "transformers.models.dinat.modeling_dinat"
    monkeypatch.setattr(f"{module}.requires_backends", lambda *args: None)
    monkeypatch.setattr(f"{module}.natten2dqkrpb", lambda query, key, *args: query[..., :1].repeat(1, 1, 1, 1, 9))
    monkeypatch.setattr(f"{module}.natten2dav", lambda attention, value, *args: value)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        DinatForImageClassification(config)(pixels())
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(dinat\) does not run: transformers' network takes rows for heads"):
        load_source(str(tmp_path))


def test_a_cvt_that_averages_does_not_run(tmp_path):
    """What its refusal says of transformers."""
    config = CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3], cls_token=[False] * 3)
    network = CvtForImageClassification(config).eval()
    with pytest.raises(IndexError):
        network(pixels())
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(cvt\) does not run: transformers' network asks for a CLS token"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pit_ti_224", {}, "it does not hand out patch tokens beside the CLS token"),
        ("volo_d1_224", {}, "its classifier reads the CLS token and, in another way, the patch"),
        ("crossvit_tiny_240", {"depth": [[1, 1, 0]]}, "its classifier reads 2 of them"),
        ("resnet10t", {"global_pool": "max"}, "it takes the maximum over positions"),
        ("resnet10t", {"global_pool": "catavgmax"}, "it joins the mean and the maximum"),
        ("vgg11", {}, r"its head runs pre_logits\.fc1 \(Conv2d\) over the map before it pools"),
    ],
)
def test_timm_s_refusals_say_what_the_network_does(name, options, message):
    with pytest.raises(ValueError, match=message):
        describe(timm.create_model(name, num_classes=5, **options).eval(), options, f"timm:{name}")


def test_folders_of_timm_and_of_its_wrapper(tmp_path):
    """Preprocessing, labels and weights of a folder, whoever wrote it and however it is named."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    model.pretrained_cfg |= {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5)}
    save_for_hf(model, tmp_path / "timm", model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    for source in (str(tmp_path / "timm"), f"local-dir:{tmp_path / 'timm'}", f"timm:local-dir:{tmp_path / 'timm'}"):
        loaded = load_source(source)
        assert torch.equal(loaded.state["fc.weight"], model.fc.weight)
        assert loaded.config["id2label"] == {0: "a", 1: "b", 2: "c"}
        assert tuple(loaded.image_processor.image_mean) == (0.5,) * 3
        assert loaded.image_processor.crop_size.height == 64
        assert str(tmp_path) not in loaded.config["backbone_config"].to_json_string()
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=3))
    wrapper.save_pretrained(tmp_path / "wrapper")
    assert torch.equal(load_source(str(tmp_path / "wrapper")).state["fc.weight"], wrapper.timm_model.fc.weight)
