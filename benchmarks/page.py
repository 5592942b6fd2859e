"""How long the page takes to explain an image: its classes, and all the maps that it shows, drawn.

    python benchmarks/page.py --model DIR --threads 2

What a visitor waits for, without the network and the browser: reading the file, the top classes, eleven maps and what
is left of the probability under six of them, HTML and the picture for keeping. Times are of the wall clock.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as app.py sets it, before torch is imported

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "app")]

from explanation import Explainer, open_photo  # noqa: E402
from rendering import to_html, to_picture  # noqa: E402

SIZE = (1600, 1200)  # of the photos, which are noise at several scales: what they show does not change the work


def write_photo(path: Path, seed: int) -> None:
    """A JPEG about as large as a phone's, downscaled."""
    generator = np.random.default_rng(seed)
    layers = [
        Image.fromarray(generator.integers(0, 256, (side * 3, side * 4, 3), dtype=np.uint8)).resize(SIZE)
        for side in (3, 40)
    ]
    Image.blend(*layers, 0.3).save(path, quality=90)


def explain_once(explainer: Explainer, path: Path) -> list[float]:
    """Seconds until the classes are known, and until everything is drawn."""
    start = time.perf_counter()
    photo = open_photo(str(path), explainer.pipe.decode_image)
    class_id = explainer.classes(photo)[0][0]
    known = time.perf_counter() - start
    explanation = explainer.explain(photo, class_id)
    depth = len(explanation.attention)
    to_html(explanation, explainer.colors, 0.6, depth)
    to_picture(explanation, explainer.colors, 0.6, depth).save(path.with_suffix(".png"))
    return [known, time.perf_counter() - start]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with a CAStream model")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=20, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import pipeline

    explainer = Explainer(pipeline("image-explanation", model=options.model, trust_remote_code=True))
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{index}.jpg" for index in range(options.images)]
        for seed, path in enumerate(paths):
            write_photo(path, seed)
        before = time.process_time()
        seconds = [explain_once(explainer, path) for path in paths]
        processor = (time.process_time() - before) / len(paths)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    for name, values in zip(("classes", "everything"), zip(*seconds, strict=True), strict=True):
        middle, largest = statistics.median(values), max(values)
        print(f"{name:<12} median {middle:.2f} s, largest {largest:.2f} s of {len(values)} images")
    print(f"processor    {processor:.2f} s per image; {options.threads} threads, load average {load:.1f}")


if __name__ == "__main__":
    main()
