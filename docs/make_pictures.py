"""Make the README's picture: photos and scenes, each with its Grad-CAM, evidence and object map.

pip install scikit-image
python docs/make_pictures.py --photos outputs/evidence/model --scenes outputs/demo/model
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from castream.data.scenes.rendering import CLASS_NAMES, render_scene  # noqa: E402
from castream.evaluation.figures import ExampleRow, write_examples  # noqa: E402
from skimage import data  # noqa: E402
from transformers import AutoImageProcessor  # noqa: E402

from modeling_castream import CAStreamForImageClassification, explain  # noqa: E402

SCENES = (5, 13, 30, 44)  # held-out scenes of the default seed: not chosen for their maps
PHOTOS = (data.chelsea, data.coffee, data.rocket, data.astronaut)  # public domain
METHODS = {"grad_cam": "Grad-CAM", "evidence": "evidence", "object": "object"}


def explained(folder: str, images: list[Image.Image], masks: list, titles: list[str] | None) -> list[ExampleRow]:
    """What a model's methods say of images, as GAP's prediction rests on them; without titles, what it predicts."""
    model = CAStreamForImageClassification.from_pretrained(folder).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = image_processor(images=images, return_tensors="pt").pixel_values
    maps = [explain(model, pixel_values, None, method, "gap", upsample=False) for method in METHODS]
    if titles is None:
        with torch.no_grad():
            predicted = model(pixel_values, pooling="gap").logits.argmax(-1).tolist()
        titles = [model.config.id2label[label].split(",")[0].replace(" ", "\n") for label in predicted]
    mean, std = (np.array(value)[:, None, None] for value in (image_processor.image_mean, image_processor.image_std))
    seen = [(255 * (pixels.numpy() * std + mean)).round().clip(0, 255).astype(np.uint8) for pixels in pixel_values]
    return [
        ExampleRow(title, pixels.transpose(1, 2, 0), [one[place].numpy() for one in maps], mask)
        for place, (title, pixels, mask) in enumerate(zip(titles, seen, masks, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", default="outputs/evidence/model", help="model trained by recipes/photos_evidence.yaml"
    )
    parser.add_argument("--scenes", default="outputs/demo/model", help="model of the demo")
    parser.add_argument("--output", default=str(ROOT / "docs" / "evidence.png"), help="picture to write")
    arguments = parser.parse_args()
    photos = [Image.fromarray(photo()) for photo in PHOTOS]
    scenes = [render_scene(0, index, split="validation") for index in SCENES]
    names, masks = [CLASS_NAMES[scene.label] for scene in scenes], [np.asarray(scene.mask) > 0 for scene in scenes]
    rows = [
        explained(arguments.photos, photos, [None] * len(photos), None),
        explained(arguments.scenes, [scene.image for scene in scenes], masks, names),
    ]
    with tempfile.TemporaryDirectory() as folder:
        halves = []
        for number, half in enumerate(rows):
            write_examples(Path(folder) / f"{number}.png", half, list(METHODS.values()))
            halves.append(Image.open(Path(folder) / f"{number}.png").convert("RGB"))
    picture = Image.new("RGB", (sum(half.width for half in halves), max(half.height for half in halves)), "white")
    for number, half in enumerate(halves):
        picture.paste(half, (sum(one.width for one in halves[:number]), 0))
    picture.save(arguments.output)


if __name__ == "__main__":
    main()
