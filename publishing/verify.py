"""The check before an upload: the folder loads in a fresh process without castream, and the model answers the same."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from castream.artifacts.models import load_image_processor
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_castream import CAStreamForImageClassification

SCRIPT = Path(__file__).parent / "fresh_load.py"
TOLERANCE = 1e-5
TIMEOUT = 1800
# Variables that a stranger's process must not profit from: code on the path, and the user's token.
_WITHHELD = ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


def verify(folder: Path, model: CAStreamForImageClassification) -> float:
    """Load `folder` in a process of its own, and compare its logits and pixels with `model`'s.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ValueError: where the folder does not load there, or answers otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8, generator=generator)
    processor = load_image_processor(folder)
    pixel_values = processor(images=Image.fromarray(noise.numpy()), return_tensors="pt")["pixel_values"]
    expected = {"pixel_values": pixel_values}
    with torch.no_grad():
        for pooling in ("ca", model.config.source_pooling):
            expected[pooling] = model(pixel_values.to(model.dtype), pooling=pooling).logits.float()
    found = _load_elsewhere(folder, noise)
    largest = 0.0
    for name, values in expected.items():
        difference = (found[name] - values).abs().max().item() / max(values.abs().max().item(), 1e-12)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the folder to publish answers otherwise than the model ({name} differs by {difference:.1e} of its "
                "largest value): nothing was published."
            )
        largest = max(largest, difference)
    return largest


def _load_elsewhere(folder: Path, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(prefix="castream-verify-") as scratch:
        scratch = Path(scratch)
        save_file({"image": image}, scratch / "inputs.safetensors")
        environment = {name: value for name, value in os.environ.items() if name not in _WITHHELD}
        files = folder.resolve(), scratch / "inputs.safetensors", scratch / "out.safetensors"
        try:
            process = subprocess.run(
                [sys.executable, "-I", SCRIPT, *files],
                cwd=scratch,
                env=environment | {"HF_HOME": str(scratch / "hf_home"), "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"the folder to publish did not load within {TIMEOUT} s: nothing was published.") from None
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the folder to publish does not load without castream installed: {reason}")
        return load_file(scratch / "out.safetensors")
