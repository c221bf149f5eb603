"""Scores of translations: metric modules for `evaluate`, and whole evaluations of a model."""

from dragoman.evaluation.run import comparison_table, evaluate_model
from dragoman.evaluation.scores import METRICS, build_compute_metrics, compute_scores, headline, load_metric


__all__ = [
    "METRICS",
    "build_compute_metrics",
    "comparison_table",
    "compute_scores",
    "evaluate_model",
    "headline",
    "load_metric",
]
