"""Pretrained classifiers and research checkpoints as CA-Stream models."""

from castream.conversion.classifier import convert_classifier, load_source

__all__ = ["convert_classifier", "load_source"]
