"""What an evaluation found: the per-image table, its summary and its pictures."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from castream.artifacts.files import new_file, write_file, write_json

from .markdown import to_markdown
from .settings import EvaluationSettings
from .store import TABLE_NAME, Part, SavedPart


@dataclass
class Report:
    """An evaluation's results.

    Args:
        settings: what was evaluated.
        part: the whole per-image table.
        results: settings, versions, sample, accuracy, rows and paired differences, as results.json holds them.
        examples: images and maps for the picture, by index.
        published: what the paper gives for this network and dataset, see `published.published_rows`.
    """

    settings: EvaluationSettings
    part: Part | SavedPart
    results: dict
    examples: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    published: tuple[str, dict, dict] | None = None

    @property
    def per_image(self) -> pd.DataFrame:
        """One row an image, target and row of the table."""
        return self.part.table.to_pandas()

    def markdown(self) -> str:
        """results.md."""
        return to_markdown(self.results, self.published)

    def write(self, output_dir: str | Path) -> None:
        """Write results.json, results.md, per_image.parquet, examples.png and curves.png, each whole or not at all."""
        from .figures import write_curves, write_report_examples

        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not (isinstance(self.part, SavedPart) and self.part.path == folder / TABLE_NAME):
            with new_file(folder / TABLE_NAME) as partial:
                Part(self.part.table, self.part.blocks, self.part.skipped).write(partial)
        write_file(folder / "results.md", self.markdown().encode())
        if self.examples:
            write_report_examples(folder / "examples.png", self)
        if "insertion" in self.settings.metrics or "deletion" in self.settings.metrics:
            write_curves(folder / "curves.png", self)
        write_json(folder / "results.json", self.results)
