"""On a GPU everything says what it says on the CPU; skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from castream.data.masks import BACKGROUNDS, KINDS, draw_backgrounds, draw_masks, make_backgrounds, show_masked
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.settings import CONTROL_MAPS, CONTROLS

from castream.explain import explain_photos
from modeling_castream import ImageExplanationPipeline, explain
from modeling_castream.features_castream import extract
from modeling_castream.folding_castream import folding, inference_backbone
from modeling_castream.saliency_castream import METHODS as ALL_METHODS
from tests.evaluation.small import MEAN, STD, small_examples, small_image, small_model, small_processor
from tests.modeling_castream.tiny import METHODS, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EVIDENCE = {"evidence_queries": ["memory", "constant"], "evidence_depths": 2}


@pytest.fixture
def exact():
    """Convolutions and matrix products in float32, not in TF32, which a GPU takes for convolutions by default."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def on_both(**kwargs):
    """A random model on the CPU, the same one on the GPU, and four images."""
    model = tiny_model(**kwargs)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model, copy.deepcopy(model).cuda(), images


@pytest.mark.parametrize("kind", ["resnet", "convnext", "timm", "neck", "vit"])
def test_every_method_draws_the_cpus_map(kind, exact):
    model, on_gpu, images = on_both(kind=kind, **(EVIDENCE if kind == "resnet" else {}))
    methods = [*METHODS, *(["evidence", "object"] if kind == "resnet" else ["cls_attention"] if kind == "vit" else [])]
    for method in methods:
        poolings = ["ca"] if ALL_METHODS[method].needs_positions else ["ca", "source"]
        target = torch.tensor([0, 1, 2, 3])
        options = {"image_mean": MEAN, "image_std": STD, "normalize": False}
        for pooling in poolings:
            expected = explain(model, images, target, method, pooling, **options)
            found = explain(on_gpu, images, target, method, pooling, **options)
            assert found.is_cuda
            worst, scale = (found.cpu() - expected).abs().max(), expected.abs().max()
            assert worst <= 1e-3 * scale, f"{method} under {pooling}: {worst / scale:.1e}"


@pytest.mark.parametrize("kind", ["resnet", "timm", "neck"])
def test_batch_norms_are_folded(kind):
    """Also where convolutions are rounded to TF32: what comes out is compared in float32."""
    _, model, images = on_both(kind=kind)
    with folding(), torch.no_grad():
        assert inference_backbone(model.castream.backbone, images.cuda()) is not model.castream.backbone


def test_the_forward_pass_agrees(exact):
    model, on_gpu, images = on_both(**EVIDENCE)
    with torch.no_grad():
        expected, found = model(images), on_gpu(images.cuda())
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.evidence_map.cpu(), expected.evidence_map, rtol=1e-3, atol=1e-5)


def test_masked_views_are_the_cpus():
    draw = torch.Generator().manual_seed(0)
    pixels, saliency = torch.rand(5, 3, 64, 64, generator=draw), torch.rand(5, 4, 4, generator=draw)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    seeds = torch.arange(5)

    def views(device: str) -> torch.Tensor:
        values = ((pixels - mean) / std).to(device)
        masks = draw_masks(seeds, saliency.to(device), KINDS, (64, 64))
        backgrounds = make_backgrounds(values, BACKGROUNDS, mean.to(device), std.to(device))
        chosen = draw_backgrounds(seeds, len(KINDS), BACKGROUNDS)
        shown = [show_masked(values, masks[:, number], backgrounds, chosen[:, number]) for number in range(len(KINDS))]
        return torch.stack(shown).cpu()

    expected = views("cpu")
    assert ((views("cuda") - expected).abs() < 1e-4).float().mean() > 0.999  # the edge of a blob may be a pixel further
    with torch.autocast("cuda", torch.bfloat16):
        assert views("cuda").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype):
    model, on_gpu, images = on_both()
    expected = extract(model, images).logits("ca")
    with torch.autocast("cuda", dtype):
        found = extract(on_gpu, images.cuda()).logits("ca")
    assert found.dtype == torch.float32
    assert (found.cpu() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_compiled_model_agrees(exact):
    model, on_gpu, images = on_both(**EVIDENCE)
    with torch.no_grad():
        expected, found = model(images), torch.compile(on_gpu)(images.cuda())
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.evidence_map.cpu(), expected.evidence_map, rtol=1e-2, atol=1e-4)


def test_a_pipeline_takes_the_gpu_by_itself(exact):
    model, processor = tiny_model(), small_processor()
    expected = ImageExplanationPipeline(
        model=copy.deepcopy(model), image_processor=processor, task="image-explanation", device="cpu"
    )(small_image(0), method="score_cam", top_k=2)
    pipe = ImageExplanationPipeline(model=model, image_processor=processor, task="image-explanation")
    assert pipe.model.device.type == "cuda"
    for one, other in zip(pipe(small_image(0), method="score_cam", top_k=2), expected, strict=True):
        assert one["label"] == other["label"] and abs(one["score"] - other["score"]) < 1e-4
        np.testing.assert_allclose(one["saliency"], other["saliency"], atol=2e-3)


def test_photos_are_explained(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    small_processor().save_pretrained(tmp_path / "model")
    small_image(0).save(tmp_path / "photo.png")
    (answer,) = explain_photos(tmp_path / "photo.png", str(tmp_path / "model"), output=tmp_path / "out", top_k=1)
    assert answer.error is None and (tmp_path / "out/contact_sheet.png").is_file()


def test_an_evaluation_agrees(exact):
    settings = EvaluationSettings(
        methods=("grad_cam", "raw_attention", "score_cam"), controls=tuple(CONTROLS), batch_size=3, num_examples=1
    )

    def evaluate(cpu: bool):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=cpu)
        return evaluate_saliency(small_model(), small_processor(), small_examples(6), settings, accelerator=accelerator)

    found, expected = evaluate(cpu=False), evaluate(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = {(row["method"], row["pooling"], row["control"]): row["metrics"] for row in expected.results["rows"]}
    assert found.results["device"] == "cuda"
    for row in found.results["rows"]:
        if row["method"] in CONTROL_MAPS:  # of two pixels that mirror each other rounding says which comes first
            continue
        for metric, entry in row["metrics"].items():
            other = rows[row["method"], row["pooling"], row["control"]][metric]
            assert (entry is None) == (other is None)
            assert entry is None or abs(entry["mean"] - other["mean"]) < 0.1, (row["method"], row["control"], metric)
