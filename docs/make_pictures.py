"""Make the README's picture from the model that `accelerate launch train.py` leaves behind.

python docs/make_pictures.py --model outputs/demo/model
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from castream.data.scenes.rendering import CLASS_NAMES, render_scene  # noqa: E402
from castream.evaluation.figures import ExampleRow, write_examples  # noqa: E402
from transformers import AutoImageProcessor  # noqa: E402

from modeling_castream import CAStreamForImageClassification, explain  # noqa: E402

SCENES = (5, 13, 30, 44)  # held-out scenes of the default seed: not chosen for their maps
COLUMNS = (("raw_attention", "ca"), ("grad_cam", "gap"), ("grad_cam", "ca"), ("attention_cam", "ca"))
TITLES = ("attention\n(CA)", "Grad-CAM\n(GAP)", "Grad-CAM\n(CA)", "attention CAM\n(CA)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo/model", help="folder of a model trained on the scenes")
    parser.add_argument("--output", default=str(ROOT / "docs" / "scenes.png"), help="picture to write")
    arguments = parser.parse_args()
    model = CAStreamForImageClassification.from_pretrained(arguments.model).eval()
    image_processor = AutoImageProcessor.from_pretrained(arguments.model)
    scenes = [render_scene(0, index, split="validation") for index in SCENES]
    pixel_values = image_processor(images=[scene.image for scene in scenes], return_tensors="pt").pixel_values
    target = torch.tensor([scene.label for scene in scenes])
    maps = [explain(model, pixel_values, target, method, pooling, upsample=False) for method, pooling in COLUMNS]
    rows = [
        ExampleRow(
            CLASS_NAMES[scene.label],
            np.asarray(scene.image),
            [each[i].numpy() for each in maps],
            np.asarray(scene.mask) > 0,
        )
        for i, scene in enumerate(scenes)
    ]
    write_examples(arguments.output, rows, TITLES)


if __name__ == "__main__":
    main()
