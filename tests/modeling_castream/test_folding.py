"""Batch norms folded into convolutions: the same numbers, the original untouched."""

import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from transformers import BitImageProcessor, pipeline

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, explain, modeling_castream
from modeling_castream.cam_castream import eigen_cam, normalize_maps
from modeling_castream.folding_castream import fold_batch_norms, folding, inference_backbone
from tests.modeling_castream.tiny import tiny_resnet


def trained(network: nn.Module) -> nn.Module:
    """A network in eval mode whose batch norms are off their trivial values."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


def count_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def check(network: nn.Module, left: int, size: int = 64) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pixel_values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    folded = fold_batch_norms(network, pixel_values[:1])
    assert count_norms(folded) == left
    with torch.no_grad():
        expected = network(pixel_values)
        torch.testing.assert_close(folded(pixel_values), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_plain_grouped_and_depthwise_convolutions():
    check(trained(torchvision.models.mobilenet_v2()), left=0)
    check(trained(timm.create_model("regnety_002")), left=0)


def test_timms_norms_keep_their_activation_and_its_padded_convolutions_fold():
    check(trained(timm.create_model("tf_efficientnet_lite0")), left=0)


def test_norms_that_no_convolution_precedes_stay():
    network = trained(timm.create_model("densenet121"))
    check(network, left=62)


class Branching(nn.Module):
    """A convolution whose output is used beside the norm, so that folding would change the network."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixel_values)
        return features + self.norm(features)


class ChangedInPlace(nn.Module):
    """The norm takes the very tensor that the convolution made, but with other values."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(pixel_values).relu_())


class SharedNorm(nn.Module):
    """One norm after two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.norm(self.first(pixel_values))))


def test_what_cannot_be_folded_is_left_alone():
    pixel_values = torch.randn(1, 3, 8, 8)
    for network in (Branching(), ChangedInPlace(), SharedNorm(), nn.Conv2d(3, 4, 3)):
        assert fold_batch_norms(trained(network), pixel_values) is None


def explained_model() -> CAStreamForImageClassification:
    """A model whose folded copy would be told from it, in eval mode."""
    torch.manual_seed(0)
    model = CAStreamForImageClassification(CAStreamConfig(backbone_config=tiny_resnet(), num_labels=5))
    trained(model)
    return model


def test_explanations_run_the_folded_copy_and_gradients_the_original():
    model, pixel_values = explained_model(), torch.randn(2, 3, 64, 64)
    expected = model(pixel_values, pooling="gap").logits
    with torch.no_grad(), folding():
        twin = inference_backbone(model.castream.backbone, pixel_values)
        assert twin is not model.castream.backbone and count_norms(twin) == 0
        assert inference_backbone(model.castream.backbone, pixel_values) is twin
        feature_maps, _ = model.castream.extract_features(pixel_values)
    logits = model.classify(model.castream.pool_features(feature_maps, "gap")[0])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    with folding():
        assert inference_backbone(model.castream.backbone, pixel_values) is model.castream.backbone
    with torch.no_grad():
        assert inference_backbone(model.castream.backbone, pixel_values) is model.castream.backbone
    inner = explain(model, pixel_values, target=1, method="grad_cam", layer=0)
    assert inner.max() > 0.9


def test_a_changed_weight_makes_a_new_copy():
    model, pixel_values = explained_model(), torch.randn(1, 3, 64, 64)
    before = explain(model, pixel_values, target=1, method="eigen_cam", upsample=False)
    with torch.no_grad():
        for parameter in model.castream.backbone.parameters():
            parameter.mul_(1.3 * torch.rand_like(parameter))
    after = explain(model, pixel_values, target=1, method="eigen_cam", upsample=False)
    feature_map = model.castream.extract_features(pixel_values)[0][-1]
    torch.testing.assert_close(after, normalize_maps(eigen_cam(feature_map.detach())), rtol=1e-3, atol=1e-4)
    assert (after - before).abs().max() > 0.01


def test_a_stream_that_reads_a_convolution_a_norm_or_an_activation_reads_its_own_output():
    for name in ("convolution", "normalization", "activation"):
        layers = {"stream_layers": [f"embedder.embedder.{name}", "stage4"], "stream_channels": [8, 32]}
        model = trained(CAStreamForImageClassification(CAStreamConfig(backbone_config=tiny_resnet(), **layers)))
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, _ = model.castream.extract_features(pixel_values)
            with folding():
                found, _ = model.castream.extract_features(pixel_values)
                assert inference_backbone(model.castream.backbone, pixel_values) is not model.castream.backbone
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_of_a_folders_code_runs_the_copy_of_the_packages_model(tmp_path, monkeypatch):
    """Two copies of this code meet where the package is installed and a Hub folder brings its own."""
    explained_model().save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    explain = pipeline("image-explanation", model=str(tmp_path), trust_remote_code=True)
    assert type(explain.model) is CAStreamForImageClassification
    assert type(explain).__module__.startswith("transformers_modules.")
    ran = []

    def note(backbone, pixel_values):
        ran.append(inference_backbone(backbone, pixel_values))
        return ran[-1]

    monkeypatch.setattr(modeling_castream, "inference_backbone", note)
    explain(Image.new("RGB", (64, 64), "red"))
    assert ran and all(network is not explain.model.castream.backbone for network in ran)
