"""pytorch-grad-cam and captum, used as their READMEs use them, on a model that was saved and loaded."""

import pytest
import torch
from torch import nn

from modeling_castream import CAStreamForImageClassification, explain
from modeling_castream.cam_castream import normalize_maps
from modeling_castream.saliency_castream import upsample_maps
from tests.modeling_castream.tiny import tiny_model

TARGET = 2
PIXEL_VALUES = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


class Logits(nn.Module):
    """What both packages need of a transformers model: a tensor for a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@pytest.fixture
def model(tmp_path) -> CAStreamForImageClassification:
    tiny_model().save_pretrained(tmp_path)
    return CAStreamForImageClassification.from_pretrained(tmp_path)


def last_layer(model: CAStreamForImageClassification) -> nn.Module:
    return model.castream.backbone.encoder.stages[-1]


def test_pytorch_grad_cam_on_an_unfrozen_model(model):
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model.requires_grad_(True)  # its hooks need a gradient in the backbone; its constructor calls eval()
    with pytorch_grad_cam.GradCAM(model=Logits(model), target_layers=[last_layer(model)]) as cam:
        found = cam(input_tensor=PIXEL_VALUES, targets=[ClassifierOutputTarget(TARGET)] * 2)
    expected = normalize_maps(explain(model, PIXEL_VALUES, target=TARGET))  # it scales what it has upsampled
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-3)


def test_captum_on_a_frozen_model(model):
    attr = pytest.importorskip("captum.attr")
    assert not any(parameter.requires_grad for parameter in model.castream.backbone.parameters())
    maps = attr.LayerGradCam(Logits(model), last_layer(model)).attribute(PIXEL_VALUES, target=TARGET)
    found = upsample_maps(normalize_maps(maps.detach()[:, 0].relu()), PIXEL_VALUES.shape[2:])
    torch.testing.assert_close(found, explain(model, PIXEL_VALUES, target=TARGET), rtol=0, atol=1e-4)
    pixels = attr.Saliency(Logits(model)).attribute(PIXEL_VALUES.clone(), target=TARGET, abs=False)
    leaf = PIXEL_VALUES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).logits[:, TARGET].sum(), leaf)
    torch.testing.assert_close(pixels, expected)
