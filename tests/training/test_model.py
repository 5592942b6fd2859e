import math
from types import SimpleNamespace

import pytest
import torch
from castream.training.model import adapt_model, fit_linear_classifier
from transformers import AutoConfig

from modeling_castream import CAStreamConfig, CAStreamForImageClassification


def make(count=60, width=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=generator)
    scale = torch.tensor([1.0, 100.0, 0.01, 5.0, 2.0])
    return (centres[labels] + torch.randn(count, width, generator=generator)) * scale + 3, labels


def test_the_gradient_vanishes_at_the_solution():
    features, labels = make()
    weight, bias = fit_linear_classifier(features, labels, 3, l2=0.05)
    mean, std = features.double().mean(0), features.double().std(0)
    standardised = (features - mean) / std
    gradient = torch.zeros(3, 5, dtype=torch.double)
    bias_gradient = torch.zeros(3, dtype=torch.double)
    for row, raw, label in zip(standardised, features, labels.tolist(), strict=True):
        logits = (weight.double() @ raw.double() + bias.double()).tolist()
        total = sum(math.exp(value) for value in logits)
        for index, value in enumerate(logits):
            error = math.exp(value) / total - (index == label)
            gradient[index] += error * row / len(labels)
            bias_gradient[index] += error / len(labels)
    gradient += 0.05 * weight.double() * std
    assert gradient.abs().max() < 1e-4 and bias_gradient.abs().max() < 1e-4


def test_separable_features_are_separated():
    features, labels = make()
    features[torch.arange(60), labels] += 1000
    weight, bias = fit_linear_classifier(features, labels, 3, l2=1e-3)
    assert ((features @ weight.T + bias).argmax(1) == labels).all()


def test_several_labels_per_image():
    features, labels = make(classes=2)
    targets = torch.nn.functional.one_hot(labels, 2).float()
    weight, bias = fit_linear_classifier(features, targets, 2, l2=0.01)
    logits = features @ weight.T + bias
    assert ((logits > 0) == targets.bool()).float().mean() > 0.8
    torch.testing.assert_close(logits[:, 0], -logits[:, 1], rtol=1e-2, atol=1e-2)  # the classes exclude each other


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least two classes"):
        fit_linear_classifier(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), 3, 0.1)


def test_new_classes_need_one_last_linear_layer():
    """SwiftFormer averages the logits of two."""
    sizes = {"image_size": 32, "embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    network = AutoConfig.for_model("swiftformer", **sizes)
    model = CAStreamForImageClassification(
        CAStreamConfig(backbone_config=network, whole_classifier=True, num_labels=3, variant="final")
    )
    split = SimpleNamespace(class_names=["cat", "dog"], multi_label=False)
    stream = {"init": "gap"}
    with pytest.raises(ValueError, match=r"classifier=new needs.* one linear layer.* its own 3 classes"):
        adapt_model(model, split, "new", stream, 0)
    assert adapt_model(model, SimpleNamespace(class_names=None, multi_label=False), "auto", stream, 0) == (model, False)
