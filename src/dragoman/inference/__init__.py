"""Sentences to sentences."""

from dragoman.inference.attention_maps import (
    AttentionMap,
    alignment_text,
    alignments,
    attention_map,
    attention_of_generation,
)
from dragoman.inference.loading import load
from dragoman.inference.scoring import TargetScore, score
from dragoman.inference.strategies import STRATEGIES, strategy_arguments
from dragoman.inference.translate import (
    Hypothesis,
    compare_strategies,
    score_hypotheses,
    translate,
    translate_stream,
)


__all__ = [
    "STRATEGIES",
    "AttentionMap",
    "Hypothesis",
    "TargetScore",
    "alignment_text",
    "alignments",
    "attention_map",
    "attention_of_generation",
    "compare_strategies",
    "load",
    "score",
    "score_hypotheses",
    "strategy_arguments",
    "translate",
    "translate_stream",
]
