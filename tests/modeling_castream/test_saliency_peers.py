"""Our maps beside pytorch-grad-cam's, torch-cam's and captum's: equal where the definitions are, and only there."""

import pytest
import torch

from benchmarks.agreement import ROWS, difference
from tests.modeling_castream.tiny import tiny_model

PACKAGES = ("pytorch_grad_cam", "torchcam", "captum")
CASES = [(row, pooling) for row in ROWS for pooling in row.poolings]


@pytest.fixture(scope="module")
def case():
    for package in PACKAGES:
        pytest.importorskip(package)
    model = tiny_model("neck", num_labels=5)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
        model.classifier.bias.fill_(1.0)
    return model, torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("row", "pooling"), CASES, ids=[f"{row.peer}-{row.setting}-{pooling}" for row, pooling in CASES]
)
def test_agreement(case, row, pooling):
    model, pixel_values = case
    with torch.no_grad():
        target = model(pixel_values, pooling=pooling).logits.argmax(-1).tolist()
    found = difference(row, model, pixel_values, target, pooling)
    if row.why:
        assert found > 1e-4, "the definitions are said to differ"
    else:
        assert found < 2e-4
