"""Pipelines by the names of their tasks, those included that Transformers 5 gave up."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from dragoman.data.tokenizers import ProcessingClass
from dragoman.inference.loading import load
from dragoman.models.pipeline_dragoman import TASK, Seq2SeqGenerationPipeline
from dragoman.settings import did_you_mean


TASKS = ("translation", "summarization", "dialogue", TASK)


def pipeline(
    task: str,
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: ProcessingClass | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    **settings: Any,
) -> Seq2SeqGenerationPipeline:
    """A pipeline for any encoder-decoder; `transformers.pipeline` refuses most of these names.

    Args:
        task: one of `TASKS`. It decides what the outputs are called: `translation_text`, `summary_text`, else
            `generated_text`.
        model: folder of a saved model, its name on the Hub, or a loaded model, which needs its `tokenizer`.
        tokenizer: what belongs to a loaded model: its tokenizer, or its processor if it has two vocabularies.
        device, dtype, revision: of a model that is loaded here, as in `load`.
        **settings: defaults of the arguments of each call, as `Seq2SeqGenerationPipeline` lists them: `batch_size=16`,
            `num_beams=4`, `source_lang="it"`.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no such task, or a loaded model without its tokenizer.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: {did_you_mean(task, TASKS)}")
    if not isinstance(model, PreTrainedModel):
        model, tokenizer = load(model, device, dtype, revision)
    elif tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer: give pipeline() both")
    name = "processor" if isinstance(tokenizer, ProcessorMixin) else "tokenizer"
    return Seq2SeqGenerationPipeline(model, task=task, device=model.device, **{name: tokenizer}, **settings)
