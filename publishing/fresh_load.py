"""Load a published folder as a stranger would, and write down what the model answers.

Run as a script by `verify.py` in a process of its own, isolated (`python -I`), with the castream packages hidden:

    python -I fresh_load.py FOLDER INPUTS.safetensors OUTPUTS.safetensors
"""

import importlib.abc
import sys

HIDDEN = ("modeling_castream", "training", "conversion", "evaluation", "publishing")


class _Absent(importlib.abc.MetaPathFinder):
    """An editable install puts a finder of its own on sys.meta_path: only refusing the names hides the packages."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, inputs: str, outputs: str) -> None:
    sys.meta_path.insert(0, _Absent())
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

    remote = {"trust_remote_code": True, "local_files_only": True}
    image = Image.fromarray(load_file(inputs)["image"].numpy())
    AutoConfig.from_pretrained(folder, **remote)
    AutoModel.from_pretrained(folder, **remote)
    model = AutoModelForImageClassification.from_pretrained(folder, **remote)
    processor = AutoImageProcessor.from_pretrained(folder, **remote)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    found = {"pixel_values": pixel_values}
    with torch.no_grad():
        for pooling in ("ca", getattr(model.config, "source_pooling", "gap")):  # earlier folders' code has no such name
            found[pooling] = model(pixel_values.to(model.dtype), pooling=pooling).logits.float()
    for task in ("image-classification", "image-explanation"):
        pipeline(task, model=folder, trust_remote_code=True)(image, top_k=1)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
