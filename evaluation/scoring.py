"""From images to the probabilities that the metrics compare, under every pooling and control at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_castream.saliency_castream import Features, extract

from .controls import match_norm
from .settings import EvaluationSettings
from .table import table_rows

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Scores:
    """The target's probability and the predicted class, each (batch_size,), by scoring."""

    probability: dict[str, torch.Tensor]
    predicted: dict[str, torch.Tensor]


class Scorer:
    """A model, and everything that turns its features into probabilities.

    Args:
        model: a CAStreamForImageClassification.
        settings: the evaluation's.
        mean, std: of the network's input, one value a channel, with images in [0, 1].
        temperature: of the scoring "gap_temperature".
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EvaluationSettings,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float | None = None,
    ):
        self.model, self.settings, self.temperature = model, settings, temperature
        self.mean, self.std = list(mean), list(std)
        self.scorings = list(dict.fromkeys(row.scoring for row in table_rows(settings)))
        self.multi_label = model.config.problem_type == "multi_label_classification"

    def features(self, pixel_values: torch.Tensor) -> Features:
        """One backbone pass, under the settings' autocast."""
        dtype = AUTOCAST_DTYPES.get(self.settings.autocast)
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            return extract(self.model, pixel_values)

    def logits(self, features: Features, scoring: str) -> torch.Tensor:
        """Logits (batch_size, num_labels), float32, under a scoring."""
        if scoring == "gap_temperature":
            return features.logits("gap").float() / self.temperature
        if scoring == "ca_norm":
            with torch.no_grad():
                vector = match_norm(features.pool("ca").pooler_output, features.pool("gap").pooler_output)
                return self.model.classify(vector, features.cls_token).float()
        return features.logits(scoring).float()

    def probabilities(self, features: Features, scoring: str) -> torch.Tensor:
        """Softmax probabilities (batch_size, num_labels); for multi-label models each class's own."""
        logits = self.logits(features, scoring)
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def score(self, pixel_values: torch.Tensor, target: torch.Tensor) -> Scores:
        """Score images (batch_size, num_channels, height, width), `batch_size` of the settings at a time."""
        size = self.settings.batch_size
        parts = [
            self.score_features(self.features(images), classes)
            for images, classes in zip(pixel_values.split(size), target.split(size), strict=True)
        ]
        return Scores(
            {scoring: torch.cat([part.probability[scoring] for part in parts]) for scoring in self.scorings},
            {scoring: torch.cat([part.predicted[scoring] for part in parts]) for scoring in self.scorings},
        )

    def score_features(self, features: Features, target: torch.Tensor) -> Scores:
        """Score images that went through the backbone.

        Raises:
            ValueError: on NaN or infinite logits.
        """
        scores = Scores({}, {})
        for scoring in self.scorings:
            probabilities = self.probabilities(features, scoring)
            bad = (~probabilities.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"logits under {scoring} are NaN or infinite for image {bad[0]} of a batch: the weights or, under "
                    f"autocast={self.settings.autocast!r}, the precision are broken."
                )
            scores.probability[scoring] = probabilities.gather(1, target[:, None])[:, 0]
            scores.predicted[scoring] = probabilities.argmax(1)
        return scores
