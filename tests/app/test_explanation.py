"""What the page computes and draws, without the page."""

import dataclasses
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers import ViTImageProcessor

from modeling_castream import CAStreamConfig, CAStreamForImageClassification
from modeling_castream.decoding_castream import decode_image
from tests.app.conftest import APP
from tests.modeling_castream.tiny import tiny_model


@pytest.fixture(scope="module")
def explainer(model_dir):
    from explanation import Explainer
    from transformers import pipeline

    return Explainer(pipeline("image-explanation", model=str(model_dir), trust_remote_code=True))


@pytest.fixture(scope="module")
def explanation(explainer, photos):
    from explanation import open_photo

    photo = open_photo(photos[0], decode_image)
    return explainer.explain(photo, explainer.classes(photo)[0][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just text", "not an image"),
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_without_its_path(tmp_path, content, message):
    from explanation import NoPhoto, open_photo

    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(NoPhoto, match=message) as caught:
        open_photo(str(path), decode_image)
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_image_is_refused(tmp_path, photos):
    from explanation import NoPhoto, open_photo

    (tmp_path / "photo.png").write_bytes(photos[0].read_bytes()[:2000])
    with pytest.raises(NoPhoto, match="damaged"):
        open_photo(str(tmp_path / "photo.png"), decode_image)


@pytest.mark.parametrize(("size", "message"), [((8000, 6000), "at most 40 megapixels"), ((900, 10), "too thin")])
def test_extreme_images_are_refused(tmp_path, size, message):
    from explanation import NoPhoto, open_photo

    Image.new("L", size).save(tmp_path / "photo.png")
    with pytest.raises(NoPhoto, match=message):
        open_photo(str(tmp_path / "photo.png"), decode_image)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_a_small_rgb_one(tmp_path, mode):
    from explanation import LARGEST_SIDE, open_photo

    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    Image.new(mode, (1400, 700)).save(path)
    photo = open_photo(str(path), decode_image)
    assert photo.mode == "RGB" and photo.size == (LARGEST_SIDE, LARGEST_SIDE // 2)


def test_more_pixels_than_pillow_opens_are_told(tmp_path, monkeypatch):
    from explanation import NoPhoto, open_photo

    Image.new("1", (300, 300)).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(NoPhoto, match=r"far too many pixels\. Please give one of at most 40 megapixels"):
        open_photo(str(tmp_path / "photo.png"), decode_image)


def test_damaged_metadata_does_not_cost_the_photo(tmp_path):
    from explanation import open_photo

    Image.new("RGB", (300, 200), "red").save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0garbage")
    photo = open_photo(str(tmp_path / "photo.jpg"), decode_image)
    assert photo.size == (300, 200) and not photo.info


def test_bits_and_opacity_are_what_a_viewer_shows(tmp_path):
    from explanation import NoPhoto, open_photo

    path = str(tmp_path / "photo.tiff")
    for array, expected in ((np.full((9, 9), 128 * 257, np.uint16), 128), (np.full((9, 9), 0.5, np.float32), 128)):
        Image.fromarray(array).save(path)
        assert (np.asarray(open_photo(path, decode_image)) == expected).all()
    Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(path)
    assert (np.asarray(open_photo(path, decode_image)) == 255).all()
    Image.fromarray(np.full((9, 9), 1e4, np.float32)).save(path)
    with pytest.raises(NoPhoto, match="its values go from 10000 to 10000"):
        open_photo(path, decode_image)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_photos_of_phones_are_opened_where_pillow_can(tmp_path):
    from explanation import open_photo

    Image.new("RGB", (30, 20)).save(tmp_path / "photo.avif")
    assert open_photo(str(tmp_path / "photo.avif"), decode_image).size == (30, 20)


def test_a_photo_is_turned_upright(tmp_path):
    from explanation import open_photo

    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_photo(str(tmp_path / "photo.jpg"), decode_image).size == (200, 300)


def test_maps_are_the_pipeline_s(explainer, explanation):
    answers = explainer.pipe(
        explanation.photo, method="grad_cam_plus_plus", pooling=["gap", "ca"], target=explanation.label
    )
    ours = [one for one in explanation.maps if one.title == "Grad-CAM++"]
    for one, answer in zip(ours, answers, strict=True):
        assert one.pooling == answer["pooling"] and one.before == pytest.approx(answer["score"], abs=1e-6)
        assert np.abs(one.saliency / 255 - answer["saliency"]).max() <= 0.5 / 255 + 1e-6
    assert len(explanation.maps) == 6 and len(explanation.attention) == 5


def test_classes_of_one_label_are_told_apart(explainer, explanation, monkeypatch):
    (first, label, score), (second, _, other) = explainer.classes(explanation.photo, top_k=2)
    monkeypatch.setitem(explainer.pipe.model.config.id2label, second, label)
    for class_id, probability in ((first, score), (second, other)):
        found = explainer.explain(explanation.photo, class_id)
        assert found.label == label
        before = [one.before for one in found.maps if one.pooling == explainer.pipe.model.config.pooling]
        assert before == pytest.approx([probability] * 3, abs=1e-6)


def test_what_is_left_is_the_probability_of_the_darkened_photo(explainer, explanation):
    one = explanation.maps[-1]
    pixels = np.asarray(explanation.photo) * (one.saliency[..., None] / 255)
    darkened = Image.fromarray(pixels.round().astype(np.uint8))
    [answer] = explainer.pipe(darkened, method="raw_attention", pooling=one.pooling, target=explanation.label)
    assert one.after == pytest.approx(answer["score"], abs=2e-3)
    assert one.after != pytest.approx(one.before, abs=1e-6)


def test_the_overlay_mixes_photo_and_colours_inside_the_box_only(explainer, explanation):
    from rendering import inside, overlay

    one, photo = explanation.maps[0], np.asarray(explanation.photo).astype(float)
    shown = np.asarray(overlay(one, explanation, explainer.colors, 0.25)).astype(float)
    seen = inside(one.saliency.shape, explanation.box)
    assert 0 < seen.mean() < 1  # the processor crops this photo
    expected = 0.75 * photo + 0.25 * explainer.colors[one.saliency]
    assert np.abs(shown - expected)[seen].max() <= 2
    assert np.abs(shown - 127.5 - 0.5 * photo.mean(-1, keepdims=True))[~seen].max() <= 1


def test_labels_are_escaped(explainer, explanation):
    from dataclasses import replace

    from rendering import to_html

    page = to_html(replace(explanation, label="<script>alert(1)</script>"), explainer.colors, 0.6, 5)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_picture_has_all_panels(explainer, explanation):
    from rendering import to_picture

    picture = to_picture(explanation, explainer.colors, 0.6, 1)
    assert picture.width == 676 and picture.height > 4 * 200


def test_a_port_in_use_is_said_in_one_line(model_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, APP / "app.py", "--model", model_dir, "--port", port]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = process.stderr.strip().splitlines()
    assert (
        process.returncode == 1
        and lines[-1].startswith("app: the page cannot be served, give another --port: ")
        and port in lines[-1]
    )
    assert "Traceback" not in process.stderr


@pytest.fixture(scope="module")
def evidence_explanation(tmp_path_factory, model_dir, photos):
    """Of a model with both evidence blocks, off their first values."""
    from explanation import Explainer, open_photo
    from transformers import pipeline

    model = CAStreamForImageClassification.from_pretrained(model_dir)
    config = CAStreamConfig.from_dict(model.config.to_dict() | {"evidence_queries": ["memory", "constant"]})
    torch.manual_seed(0)
    with_evidence = CAStreamForImageClassification(config)
    with_evidence.load_state_dict(model.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("model_with_evidence")
    with_evidence.save_pretrained(folder)
    shutil.copyfile(model_dir / "preprocessor_config.json", folder / "preprocessor_config.json")
    explainer = Explainer(pipeline("image-explanation", model=str(folder), trust_remote_code=True))
    photo = open_photo(photos[0], decode_image)
    return explainer.colors, explainer.explain(photo, explainer.classes(photo)[0][0])


def test_evidence_is_one_figure_before_the_pairs(evidence_explanation):
    from rendering import to_html, to_picture

    colors, explanation = evidence_explanation
    titles = [one.title for one in explanation.maps]
    assert titles[:3] == ["Evidence", "Object", "Attention-CAM"] and titles.count("Evidence") == 1
    page = to_html(explanation, colors, 0.6, 1)
    assert page.index("Evidence") < page.index("Grad-CAM") and page.count("<h3>Evidence</h3>") == 1
    to_picture(explanation, colors, 0.6, 1)


def test_a_single_evidence_block_leaves_the_pairs_in_rows(evidence_explanation):
    from rendering import to_picture

    colors, explanation = evidence_explanation
    both = to_picture(explanation, colors, 0.6, 1)
    single = dataclasses.replace(explanation, maps=explanation.maps[:1] + explanation.maps[2:])
    assert to_picture(single, colors, 0.6, 1).size == both.size


def test_a_source_that_averages_nothing_is_shown_under_its_own_name(tmp_path, photos):
    from explanation import Explainer, open_photo
    from page import build_page
    from rendering import to_html, to_picture
    from transformers import pipeline

    model = tiny_model("vit")
    model.classifier.weight.data *= 8
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    explainer = Explainer(pipeline("image-explanation", model=str(tmp_path / "vit"), trust_remote_code=True))
    photo = open_photo(photos[0], decode_image)
    explanation = explainer.explain(photo, explainer.classes(photo)[0][0])
    shown = [(one.title, one.pooling) for one in explanation.maps]
    assert shown == [(title, pooling) for title in ("Grad-CAM", "Grad-CAM++") for pooling in ("source", "ca")]
    assert all(one.saliency.std() > 0 for one in (*explanation.maps, *explanation.attention))
    html = to_html(explanation, explainer.colors, 0.6, 1)
    assert "<b>the source</b>" in html and "<b>GAP</b>" not in html and "under GAP" not in html
    to_picture(explanation, explainer.colors, 0.6, 1)
    page = str(build_page(explainer, "a ViT").get_config_file())
    assert "its own readout (the source)" in page and "(GAP)" not in page
