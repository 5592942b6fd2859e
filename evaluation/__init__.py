"""Evaluation of saliency: the protocol, its controls and its report.

    from castream.evaluation import EvaluationSettings, evaluate_saliency
    settings = EvaluationSettings(metrics=("average_drop", "insertion"))
    report = evaluate_saliency(model, image_processor, examples, settings)

The command is `python -m evaluation --help`; evaluation/README.md defines the figures.
"""

from castream.evaluation.report import Report
from castream.evaluation.run import evaluate_saliency
from castream.evaluation.settings import EvaluationSettings

__all__ = ["EvaluationSettings", "Report", "evaluate_saliency"]
