"""The model card: model_card.md filled with what is known of a model folder, and with nothing else."""

import os
from pathlib import Path

from castream.artifacts.files import new_file, read_json, write_json
from castream.artifacts.models import count_values, fingerprint_folder
from castream.evaluation.markdown import to_card_markdown
from huggingface_hub import ModelCard, ModelCardData

from .results import check_results, to_eval_results

TEMPLATE = Path(__file__).parent / "model_card.md"
MARKER = "Made by castream from its model_card.md. Publishing writes this page anew unless this line is removed."
TAGS = ["castream", "interpretability", "saliency", "attention-pooling", "arxiv:2404.14996"]
CAPTIONS = {
    "explanation.png": "An example: the same image and class under {own} and under CA.",
    "examples.png": "Examples: image, raw attention, and each method under {own} and under CA.",
    "curves.png": "Insertion and deletion curves.",
}


def _backbone_name(config: dict) -> str:
    backbone = config.get("backbone_config") or {}
    kind, name = backbone.get("model_type", "unknown"), backbone.get("backbone") or backbone.get("architecture")
    return f"timm's {name}" if name else kind


def _facts(config: dict, model_dir: Path, base_model: list[str]) -> list[tuple[str, str]]:
    """Rows of the card's table about the architecture."""
    facts = [("Backbone", ", ".join(base_model) or _backbone_name(config))]
    facts.append(("Classes", str(len(config.get("id2label") or {}) or 2)))
    facts.append(("Stream", f"{config.get('variant')}, reading {', '.join(config.get('stream_layers') or [])}"))
    facts.append(("Heads, queries", f"{config.get('num_attention_heads')}, {config.get('query')}"))
    counts = count_values(model_dir)
    if counts is not None:
        facts.append(("Stored values", f"{counts[0]:,}, of which the stream {counts[1]:,}"))
    return facts


def _flatten(recipe: dict, prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) pairs of a nested recipe, without what is unset."""
    rows = []
    for name, value in recipe.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name}.")
        elif value is not None and value != "" and value != []:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((f"{prefix}{name}", text.replace("|", "\\|").replace("\n", " ")))
    return rows


def _origin(path: Path, base_model: str | list[str] | None, license: str | None, datasets: list[str] | None) -> dict:
    """Origin and licence as given, else as an earlier card at `path` stated them."""
    known = ModelCard.load(path).data if path.is_file() else ModelCardData()
    base_model = base_model or known.base_model or []
    return {
        "base_model": [base_model] if isinstance(base_model, str) else list(base_model),
        "license": license or known.license,
        "datasets": list(datasets or known.datasets or []),
    }


def is_own_card(path: Path) -> bool:
    """Whether a README.md was made here and may be made again; one that a person wrote is left alone."""
    return MARKER in path.read_text(encoding="utf-8")


def render_model_card(
    model_dir: Path, results: dict | None, recipe: dict | None, repo_id: str | None, origin: dict
) -> ModelCard:
    """Fill the template. `origin` has base_model and datasets (lists) and license (or None)."""
    config = read_json(model_dir / "config.json", missing_ok=True)
    if config is None:
        raise ValueError(f"{model_dir} has no config.json: give the folder that save_pretrained wrote.")
    name = (repo_id or model_dir.resolve().name).split("/")[-1]
    eval_results = to_eval_results(results) if results else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=origin["license"],
        base_model=origin["base_model"] or None,
        datasets=origin["datasets"] or None,
        metrics=sorted({result.metric_type for result in eval_results}) if eval_results else None,
        tags=TAGS,
        model_name=name if eval_results else None,
        eval_results=eval_results,
    )
    features = (config.get("backbone_config") or {}).get("features") or {}
    averages = features.get("readout", "average") == "average"
    own = "GAP" if averages else "the network's own readout"
    captions = {file: caption.format(own=own) for file, caption in CAPTIONS.items()}
    order = [*CAPTIONS]
    figures = sorted(path.name for path in model_dir.glob("figures/*.png"))
    figures.sort(key=lambda name: order.index(name) if name in order else len(order))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        title=name,
        repo_id=repo_id or name,
        backbone=_backbone_name(config),
        num_blocks=len(config.get("stream_layers") or [None]),
        evidence=config.get("evidence_queries") or [],
        freeze_backbone=config.get("freeze_backbone", True),
        facts=_facts(config, model_dir, origin["base_model"]),
        figures=[{"path": f"figures/{file}", "caption": captions.get(file, Path(file).stem)} for file in figures],
        averages=averages,
        own=own,
        results=to_card_markdown(results) if results else None,
        dataset=results["dataset"] if results else None,
        recipe=_flatten(recipe) if recipe else None,
        **origin,
    )


def write_model_card(
    model_dir: str | os.PathLike,
    results: dict | None = None,
    recipe: dict | None = None,
    *,
    repo_id: str | None = None,
    base_model: str | list[str] | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
) -> Path:
    """Write a model folder's README.md from what is known of the model.

    `results` and `recipe` are also kept in the folder, as results.json and recipe.json, and read from there when not
    given; origin and licence are kept in the card's front matter: a later call, `publish`'s for one, loses nothing.
    A README.md that was not made here is left as it is.

    Args:
        model_dir: folder with a CAStream config.json; pictures in its `figures/` are shown.
        results: content of the evaluation's results.json for this very model; without any, the card says that
            nothing was measured.
        recipe: settings of the training run, name -> value, nested or not; None values are left out.
        repo_id: Hub id that the card's examples name; None: the folder's name.
        base_model: Hub id(s) of the pretrained classifier.
        license: licence of the backbone's weights, as the Hub spells it (`apache-2.0`).
        datasets: Hub ids or names of the data the stream was trained on.

    Returns:
        The path of README.md.

    Raises:
        ValueError: on a folder without config.json, on results of another program, on values that are no numbers.
    """
    model_dir = Path(model_dir)
    if results is not None:
        check_results(results)
        results = results | {"weights": fingerprint_folder(model_dir)}
        write_json(model_dir / "results.json", results)
    if recipe is not None:
        write_json(model_dir / "recipe.json", recipe)
    path = model_dir / "README.md"
    if path.is_file() and not is_own_card(path):
        return path
    results = results or read_json(model_dir / "results.json", missing_ok=True)
    recipe = recipe or read_json(model_dir / "recipe.json", missing_ok=True)
    origin = _origin(path, base_model, license, datasets)
    card = render_model_card(model_dir, results, recipe, repo_id, origin)
    with new_file(path) as partial:
        card.save(partial)
    return path
