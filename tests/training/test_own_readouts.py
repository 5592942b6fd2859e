"""A source that reads a CLS token teaches its stream as an average does."""

import json
from pathlib import Path

import pytest
import torch
from castream.training.arguments import TrainingArguments
from castream.training.objective import Objective
from castream.training.run import main
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from modeling_castream import CAStreamForImageClassification
from tests.modeling_castream.tiny import tiny_model
from tests.training.commands import start
from tests.training.tiny_data import CLASSES


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


@pytest.fixture
def vit_options(options, tmp_path) -> dict:
    """Four steps of a ViT, and what a run does after them."""
    model = tiny_model("vit", trained=False, num_labels=3, id2label=dict(enumerate(CLASSES)))
    for parameter in model.castream.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    changes = {"model": str(tmp_path / "vit"), "validation_split": "validation", "batch_size": 8, "epochs": 1}
    return options | changes | {"objective": "masked_distill"}


def check_run(options: dict) -> None:
    """Only the stream has moved; the source's own pooling and CA are compared under their names, and the card says what
    the classifier reads."""
    folder = Path(options["output_dir"])
    before, after = (load_file(Path(path) / "model.safetensors") for path in (options["model"], folder / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".stream." in name for name in moved)
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert set(results["accuracy"]) == {"source", "ca", "ca_minus_gap"}
    assert results["settings"]["methods"] == ["grad_cam", "raw_attention"]  # Attention-CAM needs pooled positions
    page = (folder / "evaluation" / "results.md").read_text()
    assert "## CA minus source, paired over images" in page and "GAP" not in page
    card = (folder / "model" / "README.md").read_text()
    assert '`pooling="source"` gives the scores' in card and "### CA minus source" in card and "GAP" not in card


def test_a_run_and_what_it_writes(vit_options, fresh_process_state):
    main(TrainingArguments(**vit_options))
    check_run(vit_options)
    model = CAStreamForImageClassification.from_pretrained(Path(vit_options["output_dir"]) / "model")
    assert model.config.source_pooling == "source"


@pytest.mark.slow
def test_a_run_in_its_own_process(vit_options):
    process = start(vit_options)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    check_run(vit_options)
