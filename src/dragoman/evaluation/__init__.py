"""Scores of translations: metric modules for `evaluate`, and whole evaluations of a model."""

from dragoman.evaluation.compare import Difference, compare_predictions, difference_table
from dragoman.evaluation.run import comparison_table, evaluate_model
from dragoman.evaluation.scores import METRICS, build_compute_metrics, compute_scores, headline, load_metric


__all__ = [
    "METRICS",
    "Difference",
    "build_compute_metrics",
    "compare_predictions",
    "comparison_table",
    "compute_scores",
    "difference_table",
    "evaluate_model",
    "headline",
    "load_metric",
]
