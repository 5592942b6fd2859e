"""The image-explanation pipeline: overlays that lie where the model looked, on any image, through any processor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, ConvNextImageProcessor, ConvNextImageProcessorPil, ViTImageProcessor

from modeling_castream import CAStreamImageProcessor, explain
from modeling_castream.overlay_castream import blend, color_map, to_original
from modeling_castream.preprocessing_castream import visible_box
from tests.modeling_castream.tiny import tiny_model

PROCESSORS = {
    "crop": lambda: ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.8),
    "crop by PIL": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.8),
    "squash": lambda: ViTImageProcessor(size={"height": 64, "width": 64}),
    "bit": lambda: BitImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}),
    "ours": lambda: CAStreamImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}),
}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))


@pytest.fixture
def pipe():
    return tiny_model().explainer(PROCESSORS["crop"]())


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(640, 480), (301, 500)])
def test_a_mark_on_the_photo_is_found_where_it_was_put(kind, size):
    """A bright spot, processed, read as a map and put back, has its centre within a processed pixel of the spot's."""
    width, height = size
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    spot = np.exp(-(((x - 0.6 * width) / 40) ** 2 + ((y - 0.45 * height) / 40) ** 2))
    photo = Image.fromarray((255 * spot).round().astype(np.uint8)).convert("RGB")
    processor = PROCESSORS[kind]()
    map_ = torch.as_tensor(processor(images=photo, return_tensors="pt")["pixel_values"])[0, :1]
    map_ = (map_ - map_.min()) / (map_.max() - map_.min())
    placed = to_original(map_, visible_box(processor, width, height), width, height)[0].double().numpy()
    center = (placed * x).sum() / placed.sum(), (placed * y).sum() / placed.sum()
    assert center == pytest.approx((0.6 * width, 0.45 * height), abs=0.5 * max(size) / 64)


def test_outside_of_the_box_saliency_is_zero_and_the_overlay_is_grey(pipe):
    answer = pipe(PHOTO, top_k=1)[0]
    left, _, right, _ = (round(edge) for edge in answer["box"])
    assert 0 < left < right < PHOTO.width
    assert not answer["saliency"][:, : left - 1].any() and not answer["saliency"][:, right + 1 :].any()
    outside = np.asarray(answer["overlay"])[:, : left - 1]
    assert (outside == outside[..., :1]).all() and outside.min() >= 127  # pale: dark would read as a low value


def test_saliency_is_explain_s_put_back(pipe):
    pixel_values = pipe.image_processor(images=PHOTO, return_tensors="pt")["pixel_values"]
    for method, pooling in (("grad_cam", "ca"), ("attention_cam", "gap"), ("raw_attention", "ca")):
        [answer] = pipe(PHOTO, method=method, pooling=pooling, target=3)
        maps = explain(pipe.model, pixel_values, target=3, method=method, pooling=pooling)
        expected = to_original(maps, pipe.visible_box(PHOTO.size), *PHOTO.size)[0].cpu().numpy()
        assert answer["saliency"].dtype == np.float32 and np.array_equal(answer["saliency"], expected)
        assert answer["saliency"].min() >= 0 and answer["saliency"].max() <= 1
        assert (answer["label"], answer["method"], answer["pooling"]) == ("LABEL_3", method, pooling)


def test_scores_and_order_are_the_classifier_s(pipe):
    pixel_values = pipe.image_processor(images=PHOTO, return_tensors="pt")["pixel_values"].to(pipe.device)
    with torch.no_grad():
        probabilities = pipe.model(pixel_values, pooling="gap").logits.softmax(-1)[0]
    answers = pipe(PHOTO, pooling="gap")
    assert [answer["score"] for answer in answers] == pytest.approx(probabilities.sort(descending=True).values.tolist())
    assert len(pipe(PHOTO, top_k=2)) == 2 and len(pipe(PHOTO, top_k=99)) == 5


def test_a_batch_a_list_and_a_generator_equal_single_images(pipe, tmp_path):
    photos = [PHOTO, PHOTO.resize((90, 120)), PHOTO.rotate(180)]
    path = tmp_path / "photo.png"
    photos[2].save(path)
    singles = [pipe(photo, top_k=2) for photo in photos]
    inputs = [photos[0], photos[1], str(path)]
    for answers in (pipe(inputs, top_k=2), pipe(inputs, batch_size=3, top_k=2), pipe((one for one in inputs), top_k=2)):
        for single, answer in zip(singles, answers, strict=True):
            assert [entry["label"] for entry in answer] == [entry["label"] for entry in single]
            for ours, theirs in zip(answer, single, strict=True):
                assert ours["saliency"].shape == theirs["saliency"].shape
                np.testing.assert_allclose(ours["saliency"], theirs["saliency"], atol=1e-4)


def test_every_holder_of_a_photo_is_explained_alike(pipe, tmp_path):
    path = tmp_path / "photo.png"
    PHOTO.save(path)
    array = np.asarray(PHOTO)
    [expected] = pipe(PHOTO, top_k=1)
    for holder in (array, path, path.read_bytes(), io.BytesIO(path.read_bytes()), {"bytes": None, "path": str(path)}):
        [answer] = pipe(holder, top_k=1)
        assert answer["label"] == expected["label"] and np.array_equal(answer["saliency"], expected["saliency"])
    for several in ((PHOTO, path), np.stack([array, array]), torch.from_numpy(np.stack([array, array]))):
        answers = pipe(several, top_k=1)
        assert len(answers) == 2
        for [answer] in answers:
            assert np.array_equal(answer["saliency"], expected["saliency"])
    assert pipe([]) == [] and pipe(()) == []


def test_sixteen_bits_are_explained_as_the_eight_that_a_viewer_shows(pipe, tmp_path):
    grey = np.asarray(PHOTO.convert("L"))
    path = tmp_path / "deep.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    for shallow, deep in zip(pipe(grey), pipe(path), strict=True):
        assert shallow["score"] == deep["score"] and np.array_equal(shallow["saliency"], deep["saliency"])


@pytest.mark.parametrize("target", [range(1, 3), torch.tensor([1, 2]), np.array([1, 2]), (1, "LABEL_2")])
def test_targets_come_in_any_sequence(pipe, target):
    assert [answer["label"] for answer in pipe(PHOTO, target=target)] == ["LABEL_1", "LABEL_2"]
    assert [answer["label"] for answer in pipe(PHOTO, target=target[0])] == ["LABEL_1"]


def test_classes_without_a_label_are_called_by_number(pipe):
    pipe.model.config.id2label = {0: "cat", 3: "dog", 7: "fox", 8: "owl", 9: "bat"}
    assert [answer["label"] for answer in pipe(PHOTO, target=range(4))] == ["cat", "LABEL_1", "LABEL_2", "dog"]


def test_several_methods_poolings_and_layers_at_once(pipe):
    answers = pipe(PHOTO, method=["grad_cam", "raw_attention"], pooling=["gap", "ca"], target=["LABEL_1", 4])
    kinds = [(answer["label"], answer["method"], answer["pooling"]) for answer in answers]
    expected = [
        (label, method, pooling)
        for label in ("LABEL_1", "LABEL_4")
        for method in ("grad_cam", "raw_attention")
        for pooling in ("gap", "ca")
    ]
    assert kinds == expected
    layers = [answer["layer"] for answer in pipe(PHOTO, method="raw_attention", layer="all", top_k=1)]
    assert layers == pipe.model.config.stream_layers


def test_a_multi_label_model_s_scores_are_sigmoids():
    pipe = tiny_model(problem_type="multi_label_classification").explainer(PROCESSORS["crop"]())
    pixel_values = pipe.image_processor(images=PHOTO, return_tensors="pt")["pixel_values"].to(pipe.device)
    with torch.no_grad():
        expected = pipe.model(pixel_values).logits.sigmoid().max().item()
    assert pipe(PHOTO)[0]["score"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lime"}, "method must be one or more of"),
        ({"method": []}, "method must be one or more of"),
        ({"pooling": "max"}, "pooling must be one or more of ca, gap"),
        ({"layer": "stage9"}, "layer must be one of"),
        ({"target": 5}, "class ids from 0 to 4"),
        ({"target": "unicorn"}, "a label of the model"),
        ({"target": []}, "target must hold at least one class"),
        ({"top_k": 0}, "top_k must be"),
        ({"alpha": 1.5}, "alpha must lie between 0"),
    ],
)
def test_bad_options_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PHOTO, **options)


def test_blending_by_hand():
    image = Image.new("RGB", (2, 1), (200, 100, 0))
    colors = color_map().astype(int)
    mixed = np.asarray(blend(image, np.array([[0.0, 1.0]]), alpha=0.25)).astype(int)
    expected = np.stack([0.75 * np.array([200, 100, 0]) + 0.25 * colors[index] for index in (0, 255)])
    assert np.abs(mixed[0] - expected).max() <= 0.5
    assert np.array_equal(np.asarray(blend(image, np.zeros((1, 2)), alpha=0.0)), np.asarray(image))
    with pytest.raises(ValueError, match="of the image's size"):
        blend(image, np.zeros((2, 1)))


def test_the_colour_map_is_inferno_and_its_lightness_rises():
    colors = color_map().astype(float)
    for index, reference in ((0, (0, 0, 4)), (128, (188, 55, 84)), (255, (252, 255, 164))):
        assert np.abs(colors[index] - reference).max() <= 4
    assert (np.diff((colors @ (0.2126, 0.7152, 0.0722))[::15]) > 5).all()  # whole steps: bytes are rounded
