"""CAStream on every AutoBackbone class that yields spatial maps, and on the main families of timm."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoConfig, ConvNextConfig, TimmBackboneConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from tests.modeling_castream.tiny import tiny_resnet, tiny_timm

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16, 32], "depths": [1] * 3, "num_stages": 3}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
PP_LCNET_BLOCKS = [[[3, 8, 8, 1, False]], [[3, 8, 16, 2, True]], *([[[3, 16, 16, 1, False]]] * 3)]

# Model type -> options of a tiny config. What is left out takes its default.
TRANSFORMERS = {
    "beit": VIT,
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "dinov3_convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "image_size": 64},
    "dinov3_vit": VIT,
    "focalnet": {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "hgnet_v2": {
        "embedding_size": 8,
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [16, 32],
        "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5],
        "stage_numb_of_layers": [2, 2],
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
    },
    "hiera": {
        "image_size": [32, 32],
        "embed_dim": 16,
        "depths": [1] * 3,
        "num_heads": [1, 2, 4],
        "masked_unit_size": [4, 4],
        "mlp_ratio": 2.0,
        "num_query_pool": 2,
    },
    "lw_detr_vit": {**VIT, "image_size": 64, "pretrain_image_size": 64, "num_windows": 4, "window_block_indices": [0]},
    "maskformer-swin": {**SWIN, "out_features": ["stage1", "stage2"]},  # the class cannot return its "stem"
    "pixio": VIT,
    "pp_lcnet": {"stem_channels": 8, "block_configs": PP_LCNET_BLOCKS},
    "pp_lcnet_v3": {"stem_channels": 8, "block_configs": PP_LCNET_BLOCKS},
    "pp_lcnet_v4": {"stem_channels": [3, 8, 8], "block_configs": PP_LCNET_BLOCKS[:4]},
    "pvt_v2": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1] * 4,
        "num_attention_heads": [1, 1, 2, 2],
    },
    "resnet": RESNET,
    "rf_detr_dinov2": {**VIT, "num_windows": 2},
    "rt_detr_resnet": RESNET,
    "sapiens2": VIT,
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {
        "stem_out_channels": 8,
        "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
        "conv_layer_strides": [[2]] * 4,
        "hidden_sizes": [8, 8, 16, 16, 32],
    },
    "tipsv2": {"vision_config": VIT, "text_config": {"hidden_size": 16, "num_attention_heads": 2}},
    "tipsv2_vision_model": VIT,
    "uvdoc_backbone": {
        "resnet_head": [[3, 8], [8, 8]],
        "resnet_configs": [[[8, 8, 1, False]], [[8, 16, 1, True]]],
        "stage_configs": [[[16, 1]], [[16, 2]]],
    },
    "vitdet": VIT,
}
# Model type -> options of a tiny config, and what the refusal says.
REFUSED = {
    "dinat": ({}, ImportError, "natten"),
    "vitpose_backbone": (VIT, ValueError, r"'stem' of VitPoseBackbone has the shape \(1, 16, 16\)"),
}
NO_CHECKPOINTING = {
    "bit",
    "convnext",
    "convnextv2",
    "dinov3_convnext",
    "hgnet_v2",
    "pp_lcnet_v4",
    "resnet",
    "rt_detr_resnet",
    "textnet",
}

# timm name -> image size, as small as the network takes.
TIMM = {
    "resnet10t": 64,
    "regnetx_002": 64,
    "convnext_atto": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_050": 64,
    "vit_tiny_patch16_224": 224,
}
TIMM_SLOW = {
    "coatnet_nano_rw_224": 224,
    "convnextv2_atto": 64,
    "deit_tiny_patch16_224": 224,
    "densenet121": 64,
    "edgenext_xx_small": 64,
    "efficientnet_b0": 64,
    "fastvit_t8": 64,
    "ghostnet_050": 64,
    "hrnet_w18_small": 64,
    "legacy_xception": 128,
    "mambaout_femto": 64,
    "mobilevit_xxs": 64,
    "pvt_v2_b0": 64,
    "regnety_002": 64,
    "repvgg_a0": 64,
    "resnext26ts": 64,
    "resnext50_32x4d": 64,
    "sequencer2d_s": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_cr_tiny_ns_224": 224,
    "twins_svt_small": 224,
    "vgg11": 64,
    "wide_resnet50_2": 64,
    "xcit_nano_12_p16_224": 224,
}
TIMM_PARAMS = [*TIMM.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in TIMM_SLOW.items())]


def transformers_model(model_type: str, **kwargs) -> tuple[CAStreamForImageClassification, torch.Tensor]:
    options = TRANSFORMERS[model_type]
    size = options.get("vision_config", options).get("image_size", 64)
    return random_model(
        AutoConfig.for_model(model_type, **options), size if isinstance(size, int) else size[0], **kwargs
    )


def timm_model(name: str, size: int) -> tuple[CAStreamForImageClassification, torch.Tensor]:
    return random_model(TimmBackboneConfig(backbone=name), size)


def random_model(backbone_config, size: int, **kwargs) -> tuple[CAStreamForImageClassification, torch.Tensor]:
    """A classifier with the stream as initialised over random weights and statistics, and images for it.

    Convolutions and linear layers keep the scale of what they are given, and batch norms take the images' statistics,
    so that the signal reaches the last map and does not blow up.
    """
    torch.manual_seed(0)
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=backbone_config, num_labels=5, **kwargs))
    backbone, pixel_values = model.castream.backbone, torch.randn(2, 3, size, size)
    for module in backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        nn.Module.train(backbone, True)(pixel_values)
    return model.eval(), pixel_values


def check_gap_init(model: CAStreamForImageClassification, pixel_values: torch.Tensor) -> None:
    with torch.no_grad():
        attended = model(pixel_values, output_hidden_states=True)
        averaged = model(pixel_values, pooling="gap")
    scale = averaged.logits.abs().max()
    assert scale > 1e-6
    torch.testing.assert_close(attended.logits / scale, averaged.logits / scale, rtol=0, atol=1e-5)
    assert [feature_map.shape[1] for feature_map in attended.hidden_states] == model.config.stream_channels
    for attention, feature_map in zip(attended.attention_maps, attended.hidden_states, strict=True):
        assert attention.shape == (2, 1, *feature_map.shape[2:])
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1))


def check_training_step(model: CAStreamForImageClassification, pixel_values: torch.Tensor) -> None:
    for parameter in model.castream.stream.parameters():  # at its initialisation, inner blocks have no gradient yet
        nn.init.normal_(parameter, std=0.1)
    model, pixel_values = model.double(), pixel_values.double()  # a query's gradient comes a long way and may be tiny
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.Rprop([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        frozen = name.startswith(("castream.backbone.", "castream.neck."))
        assert torch.equal(tensor, before[name]) == frozen, name


def check_round_trip(model: CAStreamForImageClassification, pixel_values: torch.Tensor, folder) -> None:
    model.save_pretrained(folder)
    loaded, info = CAStreamForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in model.state_dict().items()) and not state
    # What is loaded lies as it does in the file, and a kernel may sum it in another order; a copy lies as usual.
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_transformers_backbone(model_type, tmp_path):
    model, pixel_values = transformers_model(model_type)
    check_gap_init(model, pixel_values)
    check_round_trip(model, pixel_values, tmp_path)
    check_training_step(model, pixel_values)


@pytest.mark.parametrize(("name", "size"), TIMM_PARAMS)
def test_timm_backbone(name, size, tmp_path):
    model, pixel_values = timm_model(name, size)
    check_gap_init(model, pixel_values)
    check_round_trip(model, pixel_values, tmp_path)
    check_training_step(model, pixel_values)


def test_every_backbone_class_is_in_a_table():
    assert {*TRANSFORMERS, *REFUSED, "timm_backbone"} == set(MODEL_FOR_BACKBONE_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_backbones_say_why(model_type):
    options, error, message = REFUSED[model_type]
    if model_type == "dinat" and importlib.util.find_spec("natten"):
        pytest.skip("natten is installed, so that there is nothing to refuse")
    with pytest.raises(error, match=message):
        CAStreamForImageClassification(CAStreamConfig(backbone_config=AutoConfig.for_model(model_type, **options)))


def test_a_network_of_two_branches_has_no_order_of_depths():
    config = CAStreamConfig(backbone_config=TimmBackboneConfig(backbone="crossvit_tiny_240"))
    with pytest.raises(ValueError, match="must not contain any duplicates"):
        CAStreamForImageClassification(config)


@pytest.mark.parametrize("model_type", sorted({*TRANSFORMERS, *REFUSED}))
def test_default_backbone_configs_are_taken_as_they_are(model_type):
    default = AutoConfig.for_model(model_type)
    config = CAStreamConfig(backbone_config=default)
    assert config.backbone_config.to_json_string() == default.to_json_string()


def test_default_convnext_is_built():
    with torch.device("meta"):
        model = CAStreamForImageClassification(CAStreamConfig(backbone_config=ConvNextConfig()))
    assert model.config.stream_channels == [96, 96, 192, 384, 768]


def test_channels_of_submodules_are_found():
    layers = ["embedder", "encoder.stages.1.layers.0.shortcut", "stage4"]
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=tiny_resnet(), stream_layers=layers))
    assert model.config.stream_channels == [8, 16, 32]


def test_a_submodule_without_positions_is_refused():
    config = CAStreamConfig(
        backbone_config=AutoConfig.for_model("dinov2", **VIT), stream_layers=["encoder.layer.0", "stage2"]
    )
    with pytest.raises(ValueError, match=r"'encoder.layer.0' of Dinov2Backbone has the shape \(1, 17, 16\)"):
        CAStreamForImageClassification(config)


@pytest.mark.parametrize("model_type", sorted(TRANSFORMERS.keys() - NO_CHECKPOINTING))
def test_gradient_checkpointing_leaves_gradients_equal(model_type):
    model, pixel_values = transformers_model(model_type, freeze_backbone=False)
    model.train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)  # dropout and drop path
        model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()  # its name in every version from 5.17 on
    checkpointed = count_checkpoints(model)
    model(pixel_values).logits.sum().backward()
    assert checkpointed
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def count_checkpoints(model: nn.Module) -> list:
    """A list that grows with every module whose activations are dropped and computed again."""
    calls = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, checkpoint=checkpoint, **kwargs: (
                calls.append(1) or checkpoint(*args, **kwargs)
            )
    return calls


@pytest.mark.parametrize("model_type", sorted(NO_CHECKPOINTING))
def test_no_gradient_checkpointing_is_said(model_type):
    model, _ = transformers_model(model_type)
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        model.gradient_checkpointing_enable()  # its name in every version from 5.17 on


def test_no_gradient_checkpointing_of_timm_is_said():
    model, _ = random_model(tiny_timm(), 64)
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        model.gradient_checkpointing_enable()  # its name in every version from 5.17 on
