"""A source that reads a CLS token teaches its stream as an average does."""

import pytest
import torch
from castream.training.objective import Objective

from tests.modeling_castream.tiny import tiny_model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randint(0, 256, (5, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "noise": torch.randn(5, 4, 4, generator=generator),
        "seed": torch.arange(5),
    }


@pytest.mark.parametrize("loss", ["distill", "masked_distill", "mass_fidelity"])
def test_the_stream_learns_and_the_source_stays(loss):
    evidence = ["memory", "constant"] if loss == "mass_fidelity" else None
    model = tiny_model("vit", trained=False, freeze_classifier=True, evidence_queries=evidence)
    for parameter in model.castream.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    masks = {"mask_kinds": ["soft", "blob"], "mask_backgrounds": ["black"]} if evidence else {}
    objective = Objective(model.train(), [0.5] * 3, [0.25] * 3, loss, **masks)
    pixel_values = objective.normalize(batch()["images"])
    source = model(pixel_values, pooling="source").logits
    assert torch.equal(source, model(pixel_values, pooling="ca").logits)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.01), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(objective(batch())["loss"])
        losses[-1].backward()
        optimizer.step()
    if loss == "distill":  # what is taught is there from the start
        assert losses[0] == 0
    else:
        assert losses[-1] < losses[0]
        assert not torch.allclose(model(pixel_values, pooling="ca").logits, source)
    assert torch.equal(model(pixel_values, pooling="source").logits, source)
