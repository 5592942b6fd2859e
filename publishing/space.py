"""The folder of a Space: app/ as it stands, told which model to load."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

APP = Path(__file__).parent.parent / "app"
# Packages the page needs; the Space brings gradio itself, at the version that its front matter names.
REQUIREMENTS = ("torch", "torchvision", "transformers", "timm")
TESTED_GRADIO = "6.31.0"
README = """---
title: {title}
emoji: 🔎
colorFrom: indigo
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
models:
- {model}
pinned: false
---

Explains what [{model}](https://huggingface.co/{model}) saw in your image. Made with castream; duplicate it and change
`model.json` to show a model of your own. A private model needs a token, as the Space's secret `HF_TOKEN`.
"""


def installed(name: str, otherwise: str | None = None) -> str | None:
    """Version of an installed package, without the build's local part."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return otherwise


def write_space(folder: Path, repo_id: str, revision: str | None) -> None:
    """Write a Space that shows a model.

    Args:
        folder: new or empty.
        repo_id: the model.
        revision: commit that the page loads. It runs the code in there, so it should not change unseen; None for the
            newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(APP.glob("*.py")) + sorted(APP.glob("*.css")):
        shutil.copyfile(path, folder / path.name)
    requirements = [f"{name}=={found}" for name in REQUIREMENTS if (found := installed(name))]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (folder / "model.json").write_text(json.dumps({"model": repo_id, "revision": revision}, indent=2) + "\n")
    gradio = installed("gradio", TESTED_GRADIO)
    readme = README.format(title=repo_id.split("/")[1], gradio=gradio, model=repo_id)
    (folder / "README.md").write_text(readme, encoding="utf-8")
