"""Evaluation of saliency: perturbed images, localisation, intervals and the metrics."""
