"""The folder that goes to the Hub, assembled from a model folder: what is uploaded is exactly what was checked."""

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from castream.artifacts.files import read_json
from castream.artifacts.models import fingerprint_folder, load_image_processor, load_model
from PIL import Image

from modeling_castream import CAStreamForImageClassification

from .card import write_model_card
from .figure import draw_example
from .results import check_results

FOREIGN_WEIGHTS = ("pytorch_model*.bin", "tf_model.h5", "flax_model.msgpack", "model.pt", "*.ckpt")
# The folders of an absolute path: not those of an address, nor a fraction's stroke.
PATH_IN_TEXT = re.compile(r"(?<![\w:/.~])(?:~[\w.-]*)?/(?:[^\s'\"/]+/)+|(?<![\w:/.~])~[\w.-]*/")
RESULT_FIGURES = ("examples.png", "curves.png")


@dataclass
class Publication:
    """What the page of a model shall say and show.

    Args:
        model_dir: folder that `save_pretrained` wrote, with the image processor's preprocessor_config.json.
        repo_id: Hub id, `USER/NAME` or `ORGANISATION/NAME`.
        results_dir: output folder of `python -m evaluation`; None for the results.json in `model_dir`, if any.
        base_model, license, datasets: as in `write_model_card`.
        example: photo that the card explains, a path or a picture; None for none.
        figures: whether the evaluation's pictures, which show images of its dataset, are published.
    """

    model_dir: Path
    repo_id: str
    results_dir: Path | None = None
    base_model: list[str] = field(default_factory=list)
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    example: str | os.PathLike | Image.Image | None = None
    figures: bool = True


def check_model_dir(model_dir: Path) -> None:
    """Refuse a folder that cannot be published, before anything slow starts.

    Raises:
        ValueError: naming the file that is missing, or not wanted.
    """
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir} is no folder: give the one that save_pretrained wrote.")
    foreign = sorted(path.name for pattern in FOREIGN_WEIGHTS for path in model_dir.glob(pattern))
    if foreign:
        raise ValueError(
            f"{model_dir} holds weights that are not safetensors ({', '.join(foreign)}): only these are published. "
            "Save the model with save_pretrained into an empty folder."
        )
    for name in ("config.json", "preprocessor_config.json"):
        if not (model_dir / name).is_file():
            raise ValueError(f"{model_dir} lacks {name}: save the model and its image processor there.")
    if not any(model_dir.glob("*.safetensors")):
        raise ValueError(f"{model_dir} lacks model.safetensors: save the model there.")
    model_type = read_json(model_dir / "config.json").get("model_type")
    if model_type != "castream":
        raise ValueError(f"{model_dir} holds a model of type {model_type!r}, not 'castream': convert it first.")


def read_results(publication: Publication) -> dict | None:
    """The results to publish, None without any.

    Raises:
        ValueError: where they are missing, cannot be read, or are another model's.
    """
    folder = publication.results_dir or publication.model_dir
    results = read_json(folder / "results.json", missing_ok=True)
    if results is None:
        if publication.results_dir is not None:
            raise ValueError(f"{folder} lacks results.json: give the output folder of `python -m evaluation`.")
        return None
    check_results(results)
    model_dir, repo_id = publication.model_dir.resolve(), publication.repo_id
    # The evaluation keeps the digest of what it evaluated in the file that lets it go on where it was.
    weights = results.get("weights") or (read_json(folder / "evaluation.json", missing_ok=True) or {}).get("weights")
    if weights is not None:
        belongs = weights == fingerprint_folder(model_dir)
    else:
        belongs = Path(results["model"]).name in (model_dir.name, repo_id.split("/")[1])
    if not belongs:
        raise ValueError(
            f"{folder / 'results.json'} holds results of another model ({results['model']}), not of {model_dir.name}: "
            "evaluate this one."
        )
    return without_local_paths(results) | {"model": repo_id}


def without_local_paths(value):
    """Replace absolute paths, at any depth and within texts such as a command, by their last part: they say nothing to
    a reader but who wrote them."""
    if isinstance(value, dict):
        return {key: without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_local_paths(entry) for entry in value]
    if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)):
        return Path(value).name
    return PATH_IN_TEXT.sub("", value) if isinstance(value, str) else value


def assemble(publication: Publication, folder: Path, max_shard_size: str = "5GB") -> CAStreamForImageClassification:
    """Fill an empty folder with everything that is to be published, and nothing else.

    Returns:
        The model, as `publication.model_dir` has it.

    Raises:
        ValueError: on a folder or results that cannot be published.
    """
    model_dir = publication.model_dir
    check_model_dir(model_dir)
    model = load_model(model_dir)
    results = read_results(publication)
    recipe = read_json(model_dir / "recipe.json", missing_ok=True)
    image_processor = load_image_processor(model_dir)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    image_processor.save_pretrained(folder)
    _collect_figures(publication, folder, model, image_processor)
    if (model_dir / "README.md").is_file():
        shutil.copyfile(model_dir / "README.md", folder / "README.md")
    write_model_card(
        folder,
        results,
        without_local_paths(recipe),
        repo_id=publication.repo_id,
        base_model=publication.base_model,
        license=publication.license,
        datasets=publication.datasets,
    )
    return model


def _collect_figures(publication: Publication, folder: Path, model, image_processor) -> None:
    sources = sorted((publication.model_dir / "figures").glob("*.png"))
    if publication.figures and publication.results_dir is not None:
        sources += [
            publication.results_dir / name for name in RESULT_FIGURES if (publication.results_dir / name).is_file()
        ]
    if sources or publication.example is not None:
        (folder / "figures").mkdir()
    for source in sources:
        shutil.copyfile(source, folder / "figures" / source.name)
    if publication.example is not None:
        try:
            picture = draw_example(model, image_processor, publication.example)
        except (OSError, TypeError) as error:
            raise ValueError(f"the example {publication.example} is not an image that can be read: {error}") from None
        picture.save(folder / "figures" / "explanation.png")


def list_files(folder: Path) -> list[tuple[str, int]]:
    """(path within the folder, size in bytes) of every file, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
