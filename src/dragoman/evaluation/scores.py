"""Metrics by name: load one, score texts with several, or score a Seq2SeqTrainer's evaluation with them."""

import atexit
import importlib
import inspect
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin

from dragoman.inference.strategies import parse_spec
from dragoman.settings import did_you_mean


# Every metric module by its file name, with the figures that stand for it in tables and logs.
METRICS = {
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "ter": ("ter",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "exact_match": ("exact_match",),
    "wer": ("wer", "sequence_error_rate"),
    "cer": ("cer",),
    "diversity": ("distinct_2", "rep_2", "diversity"),
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


def check_metrics(specs: Sequence[str]) -> dict[str, tuple[str, evaluate.Metric, dict[str, Any]]]:
    """Metrics by label (the name, or the whole text where a name comes twice), each with its name and options.

    Raises:
        ValueError: an unknown metric, or an option that it does not have.
    """
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
        metrics[name if names.count(name) == 1 else spec] = (name, metric, options)
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
        for label, (_, metric, options) in check_metrics(metrics).items()
    }


def headline(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of `compute_scores` that stand for each metric, flat: `{"bleu": ..., "rouge1": ...}`.

    A metric given twice with different options keeps its whole text as a prefix: `"bleu:tokenize=zh"`.
    """
    figures = {}
    for label, result in scores.items():
        name = parse_spec(label)[0]
        for key in METRICS[name]:
            if key in result:  # rouge and diversity give what their options ask for
                figures[key if label == name else label if key == name else f"{label}/{key}"] = result[key]
    return figures


def build_compute_metrics(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, metrics: Sequence[str] = ("bleu", "chrf")
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of a `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        processing_class: the tokenizer, or a processor with a `target_tokenizer`; it decodes both sides without special
            tokens.
        metrics: as in `compute_scores`; unknown ones are refused here, before training.

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
