"""A CA-Stream classifier as an ONNX file with the outputs `logits`, `attention` and, with such a block, `evidence`."""

import os
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from castream.artifacts.models import load_model
from torch import nn
from transformers import AutoImageProcessor

from modeling_castream import CAStreamForImageClassification

TOLERANCE = 1e-4


class LogitsAndAttention(nn.Module):
    """A classifier's forward pass as plain tensors, which ONNX has names for."""

    def __init__(self, model: CAStreamForImageClassification, pooling: str | None = None):
        super().__init__()
        self.model, self.pooling = model, pooling
        self.outputs = ["logits", "attention", *(["evidence"] if model.config.evidence_queries else [])]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(batch_size, num_channels, height, width) -> logits (batch_size, num_labels), the last block's attention
        (batch_size, num_heads, height_L, width_L), each head summing to 1 over positions, and, with an evidence block,
        its map (batch_size, height, width), summing to 1."""
        found = self.model(pixel_values, pooling=self.pooling)
        return found.logits, found.attention_maps[-1], *([] if found.evidence_map is None else [found.evidence_map])


def _image_size(folder: str | Path) -> tuple[int, int]:
    """(height, width) of what the folder's image processor makes of an image; 224 x 224 without one."""
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError):
        return 224, 224
    pixel_values = image_processor(images=np.zeros((256, 256, 3), np.uint8), return_tensors="pt")["pixel_values"]
    return tuple(pixel_values.shape[-2:])


def _remedy(fixed_size: bool) -> str:
    return "" if fixed_size else ": networks made for one image size export with --fixed-size"


def _export(module: nn.Module, pixel_values: torch.Tensor, path: Path, fixed_size: bool) -> None:
    axes = {0: "batch_size"} if fixed_size else {0: "batch_size", 2: "height", 3: "width"}
    try:
        program = torch.onnx.export(
            module,
            (pixel_values,),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=module.outputs,
            dynamic_shapes=({axis: torch.export.Dim.DYNAMIC for axis in axes},),
        )
    except Exception as error:  # the exporter's own error quotes the whole graph
        raise ValueError(f"the model can't be exported ({type(error).__name__}){_remedy(fixed_size)}.") from None
    program.save(path)


def _largest_difference(module: nn.Module, path: Path, batches: list[torch.Tensor]) -> float:
    """Largest difference between PyTorch's and onnxruntime's outputs, relative to max(1, largest output)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failure is reported once, by us
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    difference = 0.0
    for batch in batches:
        with torch.no_grad():
            expected = [output.numpy() for output in module(batch)]
        for ours, theirs in zip(expected, session.run(module.outputs, {"pixel_values": batch.numpy()}), strict=True):
            difference = max(difference, float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max())))
    return difference


def export_onnx(
    folder: str | Path, output: str | Path, *, pooling: str | None = None, fixed_size: bool = False
) -> float:
    """Export a saved model, and verify the file with onnxruntime before it takes its name.

    Args:
        folder: of a CAStreamForImageClassification.
        output: the ONNX file; an existing one is replaced.
        pooling: `"ca"`, `"source"`, or None for the config's.
        fixed_size: whether height and width are those of the image processor; else they, like the batch size, are free.

    Returns:
        The largest difference measured, relative to max(1, largest output), over two batches of different shapes.

    Raises:
        ValueError: where the model can't be read or exported, or a difference exceeds 1e-4; then nothing is written.
    """
    output = Path(output).absolute()
    model = load_model(folder, dtype=torch.float32)
    module, (height, width) = LogitsAndAttention(model, pooling).eval(), _image_size(folder)
    generator = torch.Generator().manual_seed(0)
    other = (3, height, width) if fixed_size else (1, height + 32, width + 64)
    shapes = ((2, height, width), other)
    batches = [torch.randn(count, 3, *size, generator=generator) for count, *size in shapes]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        path = Path(temporary) / output.name
        _export(module, batches[0], path, fixed_size)
        try:
            difference = _largest_difference(module, path, batches)
        except Exception:  # onnxruntime's errors have no class of their own
            raise ValueError(f"the exported file does not run on other shapes{_remedy(fixed_size)}.") from None
        if not difference <= TOLERANCE:
            raise ValueError(f"onnxruntime's outputs differ by {difference:.2g}, more than {TOLERANCE:g}.")
        os.replace(path, output)
    return difference
