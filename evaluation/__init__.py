"""Evaluation of saliency: the protocol, its controls and its report.

    from evaluation import EvaluationSettings, evaluate_saliency
    report = evaluate_saliency(model, image_processor, examples, EvaluationSettings(metrics=("average_drop", "insertion")))

The command is `python -m evaluation --help`; evaluation/README.md defines the figures.
"""

from .report import Report
from .runner import evaluate_saliency
from .settings import EvaluationSettings

__all__ = ["EvaluationSettings", "Report", "evaluate_saliency"]
