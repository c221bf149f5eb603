"""Metrics by name: load one, score texts with several, or score a Seq2SeqTrainer's evaluation with them."""

import atexit
import importlib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin

from dragoman.inference.strategies import parse_spec
from dragoman.settings import did_you_mean, one_line


# Every metric module by its file name, with the figures that stand for it in tables and logs: is more of it better?
METRICS = {
    "bleu": {"bleu": True},
    "chrf": {"chrf": True},
    "ter": {"ter": False},
    "rouge": {"rouge1": True, "rouge2": True, "rougeL": True},
    "exact_match": {"exact_match": True},
    "wer": {"wer": False, "sequence_error_rate": False},
    "cer": {"cer": False},
    "diversity": {"distinct_2": True, "rep_2": False, "diversity": True},
}


@cache
def _cache_dir() -> str:
    folder = tempfile.TemporaryDirectory(prefix="dragoman-metrics-")
    atexit.register(folder.cleanup)
    return folder.name


def load_metric(name: str) -> evaluate.Metric:
    """A metric of `METRICS`, ready for `compute(predictions=..., references=..., **options)`.

    The same modules load with `evaluate.load(path)`, which copies them into the Hugging Face cache and stores what they
    score there. Here the class is taken from the package and its rows stay in memory, so that processes never meet and
    a read-only home is fine.

    Raises:
        ValueError: no metric has that name.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}: {did_you_mean(name, list(METRICS))}")
    module = importlib.import_module(f"dragoman.evaluation.metrics.{name}")
    metric_class = getattr(module, "".join(word.capitalize() for word in name.split("_")))
    return metric_class(keep_in_memory=True, cache_dir=_cache_dir())


def check_metrics(specs: Sequence[str]) -> dict[str, bool]:
    """The figures that these metrics give, as `headline` names them; True where more is better.

    Raises:
        ValueError: an unknown metric, option or value: one row is scored to find out.
    """
    try:
        scores = compute_scores(["a"], ["a"], specs)
    except TypeError as error:
        raise ValueError(f"metrics {', '.join(specs)}: a value is of the wrong type: {one_line(error)}") from error
    return {figure: METRICS[name][key] for figure, name, _, key in _figures(scores)}


def _parse_metrics(specs: Sequence[str]) -> dict[str, tuple[evaluate.Metric, dict[str, Any]]]:
    """Metrics by label (the name, or the whole text where a name comes twice), each with its options."""
    parsed = [(spec, *parse_spec(spec)) for spec in specs]
    names = [name for _, name, _ in parsed]
    metrics = {}
    for spec, name, options in parsed:
        metric = load_metric(name)
        parameters = inspect.signature(metric._compute).parameters
        valid = [key for key in parameters if key not in ("predictions", "references")]
        for key in options:
            if key not in valid:
                known = did_you_mean(key, valid) if valid else "it takes none."
                raise ValueError(f"metric {name!r} has no option {key!r}: {known}")
        metrics[name if names.count(name) == 1 else spec] = (metric, options)
    return metrics


def compute_scores(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], metrics: Sequence[str] = ("bleu", "chrf")
) -> dict[str, dict[str, Any]]:
    """Score texts with several metrics.

    Args:
        predictions: what the system wrote, one text a row.
        references: one accepted text, or a list of them, a row.
        metrics: names of `METRICS`, each with options if wanted: `"bleu:tokenize=zh"`, `"chrf:word_order=2"` (chrF++).

    Returns:
        the full result of each metric by its name (by the whole text where a name is given twice).

    Raises:
        ValueError: an unknown metric, option or value; counts that differ; no rows.
    """
    return {
        label: metric.compute(predictions=list(predictions), references=list(references), **options)
        for label, (metric, options) in _parse_metrics(metrics).items()
    }


def headline(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of `compute_scores` that stand for each metric, flat: `{"bleu": ..., "rouge1": ...}`.

    A metric given twice with different options keeps its whole text as a prefix: `"bleu:tokenize=zh"`.
    """
    return {figure: scores[label][key] for figure, _, label, key in _figures(scores)}


def _figures(scores: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Each figure of `headline`, with its metric's name and label and its key in that metric's result."""
    for label, result in scores.items():
        name = parse_spec(label)[0]
        for key in METRICS[name]:
            if key in result:  # rouge and diversity give what their options ask for
                yield key if label == name else label if key == name else f"{label}/{key}", name, label, key


def build_compute_metrics(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, metrics: Sequence[str] = ("bleu", "chrf")
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of a `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        processing_class: the tokenizer, or a processor with a `target_tokenizer`; it decodes both sides without special
            tokens.
        metrics: as in `compute_scores`; mistakes in them are found here, before training.

    Returns:
        a function from predictions and labels (B, T), both padded with -100 or the pad id, to the headline figures and
        `gen_len`, the mean number of generated tokens.
    """
    tokenizer: Any = processing_class
    if isinstance(processing_class, ProcessorMixin):
        tokenizer = tokenizer.target_tokenizer
    check_metrics(metrics)

    def texts(ids: Any) -> list[str]:
        return tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        predictions = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        figures = headline(compute_scores(texts(predictions), texts(evaluation.label_ids), metrics))
        real = (predictions != -100) & (predictions != tokenizer.pad_token_id)
        # The first id is the decoder's start token, which the model did not generate.
        figures["gen_len"] = float(real[:, 1:].sum(axis=1).mean())
        return figures

    return compute_metrics
