"""CAStreamConfig: defaults, validation, round trip."""

import json

import pytest
from transformers import AutoConfig, ConvNextConfig, ResNetConfig, SwinConfig, TimmBackboneConfig

from modeling_castream import CAStreamConfig, CAStreamModel
from tests.modeling_castream.tiny import tiny_convnext, tiny_resnet


def test_default_backbone_is_resnet50():
    config = CAStreamConfig()
    assert isinstance(config.backbone_config, ResNetConfig)
    assert config.backbone_config.hidden_sizes == [256, 512, 1024, 2048]


def test_the_caller_s_backbone_config_is_left_alone():
    backbone_config = tiny_resnet()
    CAStreamModel(CAStreamConfig(backbone_config=backbone_config))
    assert backbone_config.out_features == ["stage4"]


@pytest.mark.parametrize(
    ("backbone_config", "expected"),
    [
        (tiny_resnet(), ["stem", "stage1", "stage2", "stage3", "stage4"]),
        (tiny_resnet(out_features=["stage2", "stage4"]), ["stage2", "stage4"]),
        (tiny_convnext(), ["stem", "stage1", "stage2", "stage3", "stage4"]),
        (TimmBackboneConfig(backbone="resnet10t"), ["act1", "layer1", "layer2", "layer3", "layer4"]),
        (TimmBackboneConfig(backbone="resnet10t", out_indices=[3, 4]), ["layer3", "layer4"]),
    ],
)
def test_default_stream_layers(backbone_config, expected):
    config = CAStreamConfig(backbone_config=backbone_config)
    model = CAStreamModel(config)
    assert config.stream_layers == expected
    assert len(config.stream_channels) == len(expected) == len(model.stream.blocks)


def test_final_reads_the_pooled_map_only():
    config = CAStreamConfig(backbone_config=tiny_resnet(), variant="final", output_projection=False)
    model = CAStreamModel(config)
    assert config.stream_layers == ["stage4"]
    assert sum(p.numel() for p in model.stream.parameters()) == 32  # the query alone


def test_family_layers_come_from_the_backbone_config():
    convnext = CAStreamConfig(backbone_config=ConvNextConfig(layer_norm_eps=1e-7))
    assert convnext.head_layers == [{"type": "layer_norm", "eps": 1e-7}]
    assert CAStreamConfig(backbone_config=SwinConfig()).neck_layers == [{"type": "layer_norm", "eps": 1e-5}]
    assert CAStreamConfig(backbone_config=ConvNextConfig(), head_layers=[]).head_layers == []


def test_round_trip(tmp_path):
    config = CAStreamConfig(backbone_config=tiny_convnext(), num_labels=3, variant="final", num_attention_heads=2)
    CAStreamModel(config)
    config.save_pretrained(tmp_path)
    loaded = CAStreamConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CAStreamConfig)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}


def test_labels_are_complete_in_both_directions():
    config = CAStreamConfig(id2label={0: "cat", 1: "dog"})
    assert config.label2id == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of ca, gap, source, got 'max'"),
        ({"variant": "deep"}, "variant must be one of"),
        ({"init": "zero"}, "init must be one of"),
        ({"query": "both"}, "query must be one of"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"query": "class_specific", "num_attention_heads": 2}, "num_attention_heads=1, got 2"),
        ({"stream_layers": []}, "at least one layer"),
        ({"stream_layers": ["stage4", "stage4"]}, "none twice"),
        ({"variant": "final", "stream_layers": ["stage3", "stage4"]}, "variant='final' reads one layer"),
        ({"stream_channels": [8]}, "stream_channels needs one entry per stream_layers entry"),
        ({"backbone_config": {"hidden_sizes": [8]}}, "backbone_config is a dictionary without 'model_type'"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(Exception, match=message):  # a strict config wraps ValueError in its own class
        CAStreamConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stream_layers": ["stage4", "stage3"]}, "must end with the pooled feature map 'stage4'"),
        ({"stream_layers": ["stage9", "stage4"]}, "'stage9', which is neither a stage"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide .* got 3 for 8 channels"),
        ({"neck_layers": [{"type": "dropout"}]}, "neck_layers has an unknown layer"),
        ({"neck_layers": [{"type": "batch_norm", "epsilon": 1}]}, r"unknown options \['epsilon'\]"),
    ],
)
def test_values_that_do_not_fit_the_backbone_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CAStreamModel(CAStreamConfig(backbone_config=tiny_resnet(), **kwargs))
