"""Backbones small enough for a unit test."""

import torch
from transformers import ConvNextConfig, ResNetConfig, TimmBackboneConfig, ViTConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, saliency_castream


def tiny_resnet(**kwargs) -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", **kwargs)


def tiny_convnext(**kwargs) -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, **kwargs)


def tiny_timm(**kwargs) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone="resnet10t", **{"out_indices": [1, 2, 3, 4], **kwargs})


def tiny_vit(**kwargs) -> ViTConfig:
    options = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTConfig(hidden_size=32, intermediate_size=48, **options, **kwargs)


EFFICIENTNET_NECK = [
    {"type": "conv", "out_channels": 48},
    {"type": "batch_norm", "eps": 1e-3},
    {"type": "activation", "function": "relu6"},
]

# Options of a CAStreamConfig for each kind of network around the pooling; called, so that no test shares an object.
CONFIGS = {
    "resnet": lambda: {"backbone_config": tiny_resnet()},
    "convnext": lambda: {"backbone_config": tiny_convnext()},
    "timm": lambda: {"backbone_config": tiny_timm()},
    "neck": lambda: {"backbone_config": tiny_resnet(), "neck_layers": EFFICIENTNET_NECK},
    "vit": lambda: {"backbone_config": tiny_vit(), "whole_classifier": True},
    "submodules": lambda: {
        "backbone_config": tiny_convnext(),
        "stream_layers": ["stem", "encoder.stages.1.downsampling_layer", "stage4"],
        "stream_channels": [8, 16, 32],
    },
}


def tiny_model(kind: str = "resnet", seed: int = 0, **kwargs) -> CAStreamForImageClassification:
    """A classifier in eval mode with random weights and statistics. `trained=True` also makes the stream random."""
    trained = kwargs.pop("trained", True)
    torch.manual_seed(seed)
    model = CAStreamForImageClassification(CAStreamConfig(**CONFIGS[kind](), **{"num_labels": 5, **kwargs})).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)
        if trained:
            for parameter in model.castream.stream.parameters():
                parameter.normal_(std=0.5)
    return model


# Methods that every model has; the others need an evidence block or a CLS token.
METHODS = [method for method in saliency_castream.METHODS if method not in ("evidence", "object", "cls_attention")]
