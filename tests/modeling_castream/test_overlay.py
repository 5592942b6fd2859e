"""Maps on photos of any size: where they lie, which colours they get, and what that costs."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_castream.overlay_castream import Overlay, blend, color_map, to_original
from modeling_castream.saliency_castream import upsample_maps

BOXES = {
    "whole": (0.0, 0.0, 90.0, 70.0),
    "crop": (10.25, 4.5, 71.75, 66.0),
    "padded": (-20.0, 3.0, 110.0, 67.0),
    "between pixels": (33.6, 20.0, 34.2, 50.0),
}


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_maps_are_put_back_as_grid_sample_puts_them(box):
    """Bilinear inside the box, zero outside, against torch's sampler in float64."""
    maps, (width, height) = torch.rand(3, 7, 5, dtype=torch.float64), (90, 70)
    left, top, right, bottom = box
    x = (torch.arange(width).double() + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.arange(height).double() + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    expected = F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)[0]
    expected *= (y.abs() <= 1)[:, None] & (x.abs() <= 1)
    torch.testing.assert_close(to_original(maps, box, width, height), expected, rtol=0, atol=1e-12)


def test_maps_never_leave_their_range():
    """Interpolation in float32 gave 1 + 1.2e-7 where a map is 1 all over."""
    maps = torch.cat([torch.ones(1, 14, 14), torch.rand(20, 14, 14).round(decimals=1), torch.rand(20, 14, 14)])
    placed = to_original(maps, (3.3, 5.7, 601.1, 499.9), 610, 505)
    assert placed.min() >= 0 and placed.max() <= 1
    assert (placed[0, 6:499, 4:600] == 1).all()
    upsampled = upsample_maps(3 * maps - 1, (607, 501))
    assert (upsampled[0] == 2).all()
    assert (upsampled.amin((1, 2)) >= (3 * maps - 1).amin((1, 2))).all()
    assert (upsampled.amax((1, 2)) <= (3 * maps - 1).amax((1, 2))).all()


@pytest.mark.parametrize("box", [None, *BOXES.values()], ids=["none", *BOXES])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_blending_equals_the_formula(box, alpha):
    """Against (1 - alpha) photo + alpha colour, and half the photo's grey on half white outside of the box."""
    image, saliency = photo(90, 70), np.random.default_rng(1).random((70, 90), dtype=np.float32)
    pixels = np.asarray(image).astype(float)
    expected = (1 - alpha) * pixels + alpha * color_map()[(saliency * 255).round().astype(int)]
    if box is not None:
        x, y = np.arange(90) + 0.5, np.arange(70)[:, None] + 0.5
        unseen = (x < box[0]) | (x > box[2]) | (y < box[1]) | (y > box[3])
        expected[unseen] = 127.5 + 0.5 * pixels[unseen].mean(-1, keepdims=True)
    assert np.abs(np.asarray(blend(image, saliency, box, alpha)) - expected).max() <= 0.5 + 1e-4


def test_an_overlay_is_an_image_whenever_its_pixels_are_asked_for(tmp_path):
    image, saliency, box = photo(40, 30), np.random.default_rng(1).random((30, 40), dtype=np.float32), (5, 0, 35, 30)
    expected = blend(image, saliency, box, 0.4)

    def overlay() -> Overlay:
        return Overlay(image, saliency, box, 0.4)

    assert overlay().size == (40, 30) and overlay().mode == "RGB"
    overlay().save(tmp_path / "overlay.png")
    for found in (
        overlay(),
        Image.open(tmp_path / "overlay.png"),
        pickle.loads(pickle.dumps(overlay())),
        copy.deepcopy(overlay()),
        overlay().copy(),
        overlay().crop((0, 0, 40, 30)),
        overlay().convert("RGBA").convert("RGB"),
    ):
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert overlay().getpixel((7, 9)) == expected.getpixel((7, 9))
    assert overlay().resize((20, 15)).tobytes() == expected.resize((20, 15)).tobytes()
    pasted = Image.new("RGB", (40, 30))
    pasted.paste(overlay())
    assert pasted == expected


PHONE_PHOTO = """
import resource, time
import numpy as np, torch
from PIL import Image
from modeling_castream import CAStreamImageProcessor
from tests.modeling_castream.tiny import tiny_model

torch.set_num_threads(1)
processor = CAStreamImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
pipe = tiny_model().explainer(processor)
pipe(Image.new("RGB", (300, 200)))[0]["overlay"].load()
photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3024, 4032, 3), dtype=np.uint8))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
answers = pipe(photo, top_k=5)
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(answers))
"""


def test_a_phone_s_photo_costs_two_seconds_and_300_mib():
    """Five classes of 12 megapixels: five float32 maps are 231 MiB. In CPU seconds, as cores may be shared."""
    done = subprocess.run([sys.executable, "-c", PHONE_PHOTO], capture_output=True, text=True, check=True)
    seconds, mebibytes, answers = map(float, done.stdout.split())
    assert answers == 5 and seconds < 2 and mebibytes < 300
