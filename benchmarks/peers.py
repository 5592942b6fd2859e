"""The peers on a CA-Stream model: pytorch-grad-cam, torch-cam and captum, each called as its own manual does."""

import copy
import warnings

import torch
from torch import nn


class Logits(nn.Module):
    """A CA-Stream model under one pooling as the peers want it: a module that returns a tensor."""

    def __init__(self, model: nn.Module, pooling: str):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, pooling=self.pooling).logits


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy without frozen parts: pytorch-grad-cam finds no gradients in a frozen backbone, and crashes."""
    model = copy.deepcopy(model)
    model.config.freeze_backbone = False  # it calls model.eval(), which would freeze again
    return model.requires_grad_(True)


class LogProbability:
    """A target of pytorch-grad-cam: its softmax over channels then gives each channel's share of the probabilities."""

    def __init__(self, label: int):
        self.label = label

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1)[self.label]


def _quietly(peer, call):
    import pytorch_grad_cam.ablation_cam
    import pytorch_grad_cam.score_cam

    for module in (pytorch_grad_cam.ablation_cam, pytorch_grad_cam.score_cam):
        module.tqdm.tqdm = lambda steps, **kwargs: steps  # a bar per image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(peer)


def pytorch_grad_cam(
    method: str,
    network: nn.Module,
    layer: nn.Module,
    pixel_values: torch.Tensor,
    target: list[int],
    targets=None,
    **options,
) -> torch.Tensor:
    """(batch_size, height, width), ReLU'd, scaled, upsampled and scaled again."""
    import pytorch_grad_cam as package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [(targets or ClassifierOutputTarget)(label) for label in target]
    with getattr(package, method)(model=network, target_layers=[layer], **options) as peer:
        maps = _quietly(peer, lambda peer: peer(input_tensor=pixel_values, targets=targets))
    return torch.from_numpy(maps)


def torch_cam(
    method: str, network: nn.Module, layer: nn.Module, pixel_values: torch.Tensor, target: list[int], **options
) -> torch.Tensor:
    """(batch_size, height_l, width_l), scaled; ReLU'd but for CAM."""
    from torchcam import methods

    with getattr(methods, method)(network, layer, **options) as peer:
        if method in ("ScoreCAM", "CAM"):
            with torch.no_grad():
                network(pixel_values)
            return peer(target)[0]
        return peer(target, network(pixel_values.clone().requires_grad_()))[0]


def captum(
    method: str, network: nn.Module, layer: nn.Module, pixel_values: torch.Tensor, target: list[int], **options
) -> torch.Tensor:
    """(batch_size, height_l, width_l), signed."""
    from captum import attr

    maps = getattr(attr, method)(network, layer).attribute(
        pixel_values, torch.tensor(target).to(pixel_values.device), **options
    )
    return maps.sum(1).detach()
