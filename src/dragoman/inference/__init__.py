"""Sentences to sentences."""

from dragoman.inference.strategies import STRATEGIES, strategy_arguments
from dragoman.inference.translate import Hypothesis, compare_strategies, load, score, translate, translate_stream


__all__ = [
    "STRATEGIES",
    "Hypothesis",
    "compare_strategies",
    "load",
    "score",
    "strategy_arguments",
    "translate",
    "translate_stream",
]
