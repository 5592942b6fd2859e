"""A saved folder loads anywhere, bit-equal, without this package."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ConvNextImageProcessor

from modeling_castream import CAStreamForImageClassification, CAStreamModel
from tests.fresh_process import run_fresh
from tests.modeling_castream.tiny import CONFIGS, tiny_model

LOAD_EVERYTHING = """
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

results = {}
for kind in KINDS:
    folder = f"{ROOT}/{kind}"
    pixel_values = load_file(f"{folder}/inputs.safetensors")["pixel_values"]
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "castream"
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(p.requires_grad for p in model.castream.backbone.parameters())
    with torch.no_grad():
        results[f"{kind}.ca"] = model(pixel_values).logits
        results[f"{kind}.source"] = model(pixel_values, pooling="source").logits
        results[f"{kind}.attention"] = model(pixel_values).attention_maps[-1].clone()
        results[f"{kind}.pooled"] = base(pixel_values).pooler_output
    processor = AutoImageProcessor.from_pretrained(folder)
    image = Image.new("RGB", (80, 70), (200, 30, 60))
    [best] = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")(image, top_k=1)
    with torch.no_grad():
        probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)
    assert abs(best["score"] - probabilities.max().item()) < 1e-5, (best, probabilities)
    assert best["label"] == model.config.id2label[probabilities.argmax().item()]
    model.save_pretrained(f"again/{kind}")
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(f"again/{kind}", trust_remote_code=True)
        results[f"{kind}.again"] = again(pixel_values).logits
save_file(results, "results.safetensors")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of small models, and what a process without the package computed from them."""
    root = tmp_path_factory.mktemp("models")
    for kind in CONFIGS:
        model = tiny_model(kind)
        model.save_pretrained(root / kind)
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0).save_pretrained(root / kind)
        save_file({"pixel_values": torch.randn(2, 3, 64, 64)}, root / kind / "inputs.safetensors")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run_fresh(f"KINDS, ROOT = {sorted(CONFIGS)!r}, {str(root)!r}\n" + LOAD_EVERYTHING, elsewhere)
    return root, load_file(elsewhere / "results.safetensors")


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_stranger_s_process_computes_the_same_bits(saved, kind):
    root, results = saved
    pixel_values = load_file(root / kind / "inputs.safetensors")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(root / kind)
    assert type(model) is CAStreamForImageClassification
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: reductions are split by thread
    try:
        with torch.no_grad():
            out = model(pixel_values)
            assert torch.equal(results[f"{kind}.ca"], out.logits)
            assert torch.equal(results[f"{kind}.again"], out.logits)
            assert torch.equal(results[f"{kind}.attention"], out.attention_maps[-1])
            assert torch.equal(results[f"{kind}.source"], model(pixel_values, pooling="source").logits)
            base = AutoModel.from_pretrained(root / kind)
            assert type(base) is CAStreamModel
            assert torch.equal(results[f"{kind}.pooled"], base(pixel_values).pooler_output)
    finally:
        torch.set_num_threads(threads)


def test_a_folder_carries_its_code(saved):
    root, _ = saved
    files = {path.name for path in (root / "resnet").iterdir()}
    assert {"model.safetensors", "config.json", "configuration_castream.py", "modeling_castream.py"} <= files
    assert "backbone_castream.py" in files
