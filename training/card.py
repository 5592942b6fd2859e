"""The model card of a trained model, from the repository's template."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .arguments import TrainingArguments
from .model import TRAINING_FILE
from .run_folder import RunFolder
from .storage import read_json, write_file

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"


def write_card(folder: RunFolder, args: TrainingArguments) -> None:
    """Write the card beside the model, where the checkout has a template."""
    if not TEMPLATE.is_file() or not folder.model.is_dir():
        return
    results = folder.evaluation / "results.md"
    data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=["castream"])
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        base_model_name=args.model,
        dataset_name=args.dataset_name or "embedded scenes",
        objective=args.objective,
        settings=(folder.path / "settings.yaml").read_text(),
        evaluation=results.read_text() if results.is_file() else "",
        training=read_json(folder.model / TRAINING_FILE),
    )
    write_file(folder.model / "README.md", str(card).encode())
