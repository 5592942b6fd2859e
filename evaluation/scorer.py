"""From images to the probabilities that the metrics compare, under every pooling and control at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_castream.configuration_castream import resolve_pooling
from modeling_castream.features_castream import Features, run_features

from .controls import match_norm, pool_by_mask
from .settings import AVERAGE_CONTROLS, EvaluationSettings
from .table import table_rows

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Scores:
    """The target's probability and the predicted class, each (batch_size,), by scoring; a single logit predicts 1 where
    its probability is above 1/2, else 0."""

    probability: dict[str, torch.Tensor]
    predicted: dict[str, torch.Tensor]


class Scorer:
    """A model, and everything that turns its features into probabilities.

    Args:
        model: a CAStreamForImageClassification.
        settings: the evaluation's.
        mean, std: of the network's input, one value a channel, with images in [0, 1].
        temperature: of the scorings "gap_temperature" and "source_temperature".
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
        self._check_poolings()
        self.scorings = list(dict.fromkeys(row.scoring for row in table_rows(settings)))
        self.single_logit = model.config.num_labels == 1
        if self.single_logit and settings.target == "second":
            raise ValueError(
                "target='second' needs a second class, and this model has a single logit: use 'predicted'."
            )
        self.independent = self.single_logit or model.config.problem_type == "multi_label_classification"

    def _check_poolings(self) -> None:
        """Refuse poolings and controls that the model does not have."""
        config = self.model.config
        for pooling in self.settings.poolings:
            resolve_pooling(config, pooling)
        averaged = [name for name in AVERAGE_CONTROLS if name in self.settings.controls]
        if averaged and config.source_pooling != "gap":
            raise ValueError(f"controls {', '.join(averaged)} need a source that averages, and this model's does not.")

    def features(self, pixel_values: torch.Tensor) -> Features:
        """One backbone pass, under the settings' autocast; the model must be in eval mode."""
        dtype = AUTOCAST_DTYPES.get(self.settings.autocast)
        with torch.no_grad():
            return run_features(self.model, pixel_values.to(self.model.dtype), dtype)

    @torch.no_grad()
    def logits(self, features: Features, masks: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Logits (batch_size, num_labels), float32, by scoring.

        Each pooling is computed once.

        Args:
            masks: (batch_size, height, width), what the images were masked with, for the scoring "ca_bound"; None for
                whole images.
        """
        model, feature_maps, cls_token = self.model, features.feature_maps, features.cls_token
        by_scoring = {}
        with torch.autocast(feature_maps[-1].device.type, enabled=False):
            name, (gap, _) = self.settings.own_pooling, model.castream.pool_features(feature_maps, "source")
            if self._needs(name):
                by_scoring[name] = model.classify(gap, cls_token).float()
            if f"{name}_temperature" in self.scorings:
                by_scoring[f"{name}_temperature"] = by_scoring[name] / self.temperature
            if self._needs("ca"):
                ca, _ = model.castream.pool_features(feature_maps, "ca")
                by_scoring["ca"] = model.classify(ca, cls_token).float()
            if "ca_norm" in self.scorings:
                by_scoring["ca_norm"] = model.classify(match_norm(ca, gap), cls_token).float()
            if "ca_bound" in self.scorings:
                pooled = gap if masks is None else pool_by_mask(feature_maps[-1], masks.to(gap))
                by_scoring["ca_bound"] = model.classify(pooled, cls_token).float()
        return by_scoring

    def _needs(self, pooling: str) -> bool:
        return any(scoring.startswith(pooling) for scoring in self.scorings)

    def probabilities(self, features: Features, masks: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Probabilities (batch_size, num_labels) by scoring, as the model's `probabilities` has them.

        Raises:
            ValueError: on NaN or infinite logits.
        """
        by_scoring = {}
        for scoring, logits in self.logits(features, masks).items():
            if not logits.isfinite().all():
                bad = (~logits.isfinite()).any(1).nonzero()[0].item()
                raise ValueError(
                    f"logits under {scoring} are NaN or infinite for image {bad} of a batch: the weights or, under "
                    f"autocast={self.settings.autocast!r}, the precision are broken."
                )
            by_scoring[scoring] = self.model.probabilities(logits)
        return by_scoring

    def predicted(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The class, (batch_size,), that probabilities (batch_size, num_labels) say."""
        return (probabilities[:, 0] > 0.5).long() if self.single_logit else probabilities.argmax(1)

    def explained(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The class, (batch_size,), that is explained where no label is: the predicted one, or the second."""
        if self.settings.target == "second":
            return probabilities.topk(2, dim=1).indices[:, 1]
        return self.predicted(probabilities)

    def score(self, pixel_values: torch.Tensor, target: torch.Tensor, masks: torch.Tensor | None = None) -> Scores:
        """Score images (batch_size, num_channels, height, width), `batch_size` of the settings at a time; `masks` as of
        `logits`."""
        size = self.settings.batch_size
        parts = []
        for start in range(0, len(pixel_values), size):
            part = slice(start, start + size)
            shown = None if masks is None else masks[part]
            parts.append(self.score_features(self.features(pixel_values[part]), target[part], shown))
        return Scores(
            {scoring: torch.cat([part.probability[scoring] for part in parts]) for scoring in parts[0].probability},
            {scoring: torch.cat([part.predicted[scoring] for part in parts]) for scoring in parts[0].predicted},
        )

    def score_features(self, features: Features, target: torch.Tensor, masks: torch.Tensor | None = None) -> Scores:
        """Score images that went through the backbone."""
        scores = Scores({}, {})
        for scoring, probabilities in self.probabilities(features, masks).items():
            scores.probability[scoring] = probabilities.gather(1, target[:, None])[:, 0]
            scores.predicted[scoring] = self.predicted(probabilities)
        return scores
