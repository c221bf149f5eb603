"""Sentences to sentences: decode in batches of similar length, give the results in order."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from dragoman.data.batching import map_in_batches
from dragoman.data.languages import OF_CHECKPOINTS, Side, check_language, default_language, encode_texts, saved_prefix
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.inference.arguments import check_combination, check_ranges, check_token_ids
from dragoman.inference.languages import language_argument, language_id
from dragoman.inference.processes import map_in_processes
from dragoman.inference.strategies import STRATEGIES, strategy_arguments
from dragoman.models.pipeline_dragoman import language_arguments
from dragoman.settings import did_you_mean


# Rows of a batch that are scored at once times target length times vocabulary: 256 MB of logits in single precision.
LOGITS_AT_ONCE = 2**26


@dataclass
class Hypothesis:
    """One output for one input sentence.

    Attributes:
        text: the output without special tokens; "" for an empty input.
        token_ids: the generated ids without the start token, up to and with `</s>`; [] for an empty input.
        start_id: the start token, with which the decoder began; None for an empty input.
        score: what beam search ranks by, for every strategy: `log_probability / length ** length_penalty`, length being
            the number of `token_ids`. With the usual length penalty 1 it is the mean log-probability of a token. None
            where scores were not asked for; 0.0 for an empty input.
        log_probability: natural logarithm of the model's probability of the whole output given the input: the sum over
            its `token_ids`, before any temperature, truncation or penalty of the decoding. None and 0.0 as above.
    """

    text: str
    token_ids: list[int]
    start_id: int | None = None
    score: float | None = None
    log_probability: float | None = None


def translate(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    sentences: Sequence[str],
    *,
    source_lang: str | Sequence[str] | None = None,
    target_lang: str | Sequence[str] | None = None,
    source_prefix: str | Sequence[str] | None = None,
    batch_size: int = 32,
    max_tokens_per_batch: int | None = None,
    num_return_sequences: int = 1,
    scores: bool = True,
    progress: bool = False,
    processes: PartialState | None = None,
    **generation_arguments: Any,
) -> list[list[Hypothesis]]:
    """Translate sentences.

    Args:
        model, processing_class: as `load` gives them.
        sentences: the inputs; one that is empty or only spaces gives empty outputs.
        source_lang, target_lang: for a model with languages, their codes: one for all sentences, or one for each.
        source_prefix: text before every sentence (or before each its own), such as T5's "translate English to
            German: "; None takes the one that the model was trained with, if there is one.
        batch_size: sentences decoded together; they are sorted by length first.
        max_tokens_per_batch: instead of a number of sentences, the source tokens of a batch, padding included: few long
            sentences or many short ones.
        num_return_sequences: outputs per sentence, the best first; more than one needs beams or sampling.
        scores: compute `score` and `log_probability`, by one more pass over each output.
        progress: show a bar on standard error.
        processes: `accelerate.PartialState()`, to share the batches with the other processes of `accelerate launch`.
            The sentences are those of the main process; every process gets all outputs.
        **generation_arguments: settings of `model.generate`: `num_beams=4`, `do_sample=True`, `penalty_alpha=0.6`, ...
            What is left out comes from the model's own generation config.

    Returns:
        `num_return_sequences` hypotheses per sentence, in the order of the sentences.

    Raises:
        ValueError: unknown argument of `generate`; something that is no string; a language that the model does not
            have, or none where it has several; a source longer than the model's learned positions; a tokenizer whose
            ids the model does not have.
    """
    return list(
        translate_stream(
            model,
            processing_class,
            sentences,
            window=max(len(sentences), 1),
            source_lang=source_lang,
            target_lang=target_lang,
            source_prefix=source_prefix,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            num_return_sequences=num_return_sequences,
            scores=scores,
            progress=progress,
            processes=processes,
            **generation_arguments,
        )
    )


def translate_stream(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    sentences: Iterable[str],
    *,
    window: int = 2048,
    source_lang: str | Sequence[str] | None = None,
    target_lang: str | Sequence[str] | None = None,
    source_prefix: str | Sequence[str] | None = None,
    batch_size: int = 32,
    max_tokens_per_batch: int | None = None,
    num_return_sequences: int = 1,
    scores: bool = True,
    progress: bool = False,
    processes: PartialState | None = None,
    **generation_arguments: Any,
) -> Iterator[list[Hypothesis]]:
    """Translate a stream of any length, in order, holding one window of it in memory.

    Args:
        window: sentences read ahead and sorted by length together; with 1 each is answered before the next is read.

    The other arguments, what is yielded and what is raised are those of `translate`; arguments are checked at once, the
    sentences as they come.
    """
    limits = {"window": window, "batch_size": batch_size, "max_tokens_per_batch": max_tokens_per_batch}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; it must be at least 1")
    generation_arguments = {name: value for name, value in generation_arguments.items() if value is not None}
    check_generation_arguments(model, generation_arguments, num_return_sequences)
    first_tokens = _first_tokens(model, processing_class, sentences, target_lang, generation_arguments)
    encoded = _encode(model, processing_class, sentences, window, source_lang, source_prefix)
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(processing_class)
    # generate() lets max_new_tokens win over max_length wherever the two come from; here the call's own one wins.
    if "max_new_tokens" in generation_arguments:
        generation_arguments.setdefault("max_length", None)
    elif "max_length" in generation_arguments:
        generation_arguments["max_new_tokens"] = None
    stop_strings = generation_arguments.get("stop_strings") or model.generation_config.stop_strings
    if stop_strings:
        generation_arguments = {"tokenizer": target_tokenizer, **generation_arguments, "stop_strings": stop_strings}
    bar = Progress(
        TextColumn("translating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not progress or not (processes is None or processes.is_main_process),
    )
    tools = (model, source_tokenizer, target_tokenizer)
    argument = language_argument(processing_class)
    length_penalty = generation_arguments.get("length_penalty")
    task = bar.add_task("", total=len(sentences) if isinstance(sentences, Sequence) else None)

    def decode(batch: list[tuple[list[int], int | None]]) -> list[list[Hypothesis]]:
        sources = [ids for ids, _ in batch]
        starts = [token for ids, token in batch if ids and token is not None]
        arguments = generation_arguments
        if argument and starts:
            processors = arguments.get("logits_processor")
            arguments = {**arguments, **language_arguments(argument, starts, processors)}
        full = [ids for ids in sources if ids]
        found = iter(_decode_batch(*tools, full, num_return_sequences, arguments) if full else [])
        outputs = [next(found) if ids else [Hypothesis("", []) for _ in range(num_return_sequences)] for ids in sources]
        if scores:
            _score_batch(model, source_tokenizer, sources, outputs, length_penalty)
        # The other processes have batches like these, so they are about as far.
        bar.advance(task, len(batch) * (1 if processes is None else processes.num_processes))
        return outputs

    def run() -> Iterator[list[Hypothesis]]:
        rows = zip(encoded, first_tokens, strict=False)  # one token for all of a stream has no end
        size = {"batch_size": None if max_tokens_per_batch else batch_size, "max_tokens": max_tokens_per_batch}
        with bar:
            if processes is None:
                yield from map_in_batches(rows, decode, length=lambda row: len(row[0]), window=window, **size)
            else:
                yield from map_in_processes(
                    rows, decode, processes, length=lambda row: len(row[0]), window=window, **size
                )
                bar.update(task, completed=bar.tasks[task].total or bar.tasks[task].completed)

    return run()


def score_hypotheses(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    sentences: Sequence[str],
    outputs: Sequence[list[Hypothesis]],
    *,
    source_lang: str | Sequence[str] | None = None,
    source_prefix: str | Sequence[str] | None = None,
    batch_size: int = 32,
    length_penalty: float | None = None,
) -> None:
    """Write `score` and `log_probability` into hypotheses that `translate(..., scores=False)` gave.

    Args:
        model, processing_class, sentences: what the outputs come from.
        outputs: hypotheses of each sentence; only their `start_id` and `token_ids` are read.
        source_lang, source_prefix: as they were for `translate`.
        batch_size: sentences scored together.
        length_penalty: as in `generate`; None takes the model's.
    """
    source_tokenizer, _ = source_and_target_tokenizer(processing_class)

    def score_batch(batch: list[tuple[list[int], list[Hypothesis]]]) -> list[None]:
        sources, hypotheses = zip(*batch, strict=True)
        _score_batch(model, source_tokenizer, list(sources), list(hypotheses), length_penalty)
        return [None] * len(batch)

    sources = _encode(model, processing_class, sentences, max(len(sentences), 1), source_lang, source_prefix)
    pairs = zip(sources, outputs, strict=True)
    for _ in map_in_batches(pairs, score_batch, length=lambda pair: len(pair[0]), batch_size=batch_size):
        pass


def compare_strategies(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    sentences: Sequence[str],
    strategies: Sequence[str] = tuple(STRATEGIES),
    *,
    source_lang: str | Sequence[str] | None = None,
    target_lang: str | Sequence[str] | None = None,
    source_prefix: str | Sequence[str] | None = None,
    batch_size: int = 32,
    scores: bool = True,
    **generation_arguments: Any,
) -> dict[str, list[Hypothesis]]:
    """The best hypothesis of each sentence under each strategy.

    Args:
        strategies: as in `strategy_arguments`: `"greedy"`, `"beam:num_beams=8,length_penalty=0.8"`, ...
        **generation_arguments: for every strategy, for example `max_new_tokens=80`.

    The other arguments are those of `translate`. All strategies are checked before the first one runs.

    Raises:
        ValueError: as `strategy_arguments` and `translate`.
    """
    table = {strategy: strategy_arguments(strategy, **generation_arguments) for strategy in strategies}
    for settings in table.values():
        check_generation_arguments(model, settings)
    outputs = {}
    for strategy, settings in table.items():
        found = translate(
            model,
            processing_class,
            sentences,
            source_lang=source_lang,
            target_lang=target_lang,
            source_prefix=source_prefix,
            batch_size=batch_size,
            scores=scores,
            **settings,
        )
        outputs[strategy] = [best for best, *_ in found]
    return outputs


def check_generation_arguments(
    model: PreTrainedModel, arguments: Mapping[str, Any], num_return_sequences: int = 1
) -> None:
    """Refuse what `generate` cannot do with this model, or would ignore.

    Raises:
        ValueError: an unknown argument (with the nearest valid one), an id outside the vocabulary, an argument without
            effect in this mode of decoding, or more outputs than the mode has.
    """
    valid = {name for name in GenerationConfig().to_dict() if not name.startswith(("_", "output_"))}
    valid |= inspect.signature(GenerationMixin.generate).parameters.keys() | {"tokenizer", "assistant_tokenizer"}
    # What is set here, once for all, and outputs that would be thrown away.
    valid -= {"self", "inputs", "kwargs", "generation_config", "num_return_sequences", "return_dict_in_generate"}
    valid -= {"transformers_version"}
    for name in arguments:
        if name not in valid:
            raise ValueError(f"there is no generation argument {name!r}: {did_you_mean(name, sorted(valid))}")
    check_token_ids(arguments, model.config.vocab_size)
    defaults = model.generation_config
    check_ranges(arguments)
    check_combination(arguments, defaults)
    given = {name: value for name, value in arguments.items() if value is not None}
    beams, sampling = given.get("num_beams", defaults.num_beams) or 1, given.get("do_sample", defaults.do_sample)
    if num_return_sequences > 1 and (beams < num_return_sequences if beams > 1 else not sampling):
        raise ValueError(
            f"num_return_sequences={num_return_sequences} (--nbest) needs num_beams (--num-beams) of at least "
            f"{num_return_sequences}, or do_sample (--do-sample) without beams; num_beams is {beams}."
        )


def _each(name: str, value: str | Sequence[str] | None, sentences: Iterable[str]) -> Iterator[str | None]:
    """The value of each sentence: its own, or the one of all."""
    if value is None or isinstance(value, str):
        return repeat(value)
    if not isinstance(sentences, Sequence) or len(value) != len(sentences):
        count = len(sentences) if isinstance(sentences, Sequence) else "a stream of"
        raise ValueError(f"{name} has {len(value)} values for {count} sentences: give one for all, or one for each.")
    return iter(value)


def _check_languages(processing_class: ProcessingClass, side: Side, value: str | Sequence[str] | None) -> None:
    for code in dict.fromkeys([value] if value is None or isinstance(value, str) else value):
        check_language(processing_class, side, code)


def _first_tokens(
    model: Any,
    processing_class: ProcessingClass,
    sentences: Iterable[str],
    target_lang: str | Sequence[str] | None,
    generation_arguments: Mapping[str, Any],
) -> Iterator[int | None]:
    """The token of each sentence's target language; None where `generate` knows what to begin with."""
    argument = language_argument(processing_class)
    if target_lang is None:
        settings = {**model.generation_config.to_dict(), **generation_arguments}
        _, tokenizer = source_and_target_tokenizer(processing_class)
        if argument is None or settings[argument] is not None or type(tokenizer).__name__ in OF_CHECKPOINTS:
            return repeat(None)
        _check_languages(processing_class, "target", None)
        target_lang = default_language(processing_class, "target")
    elif argument is not None and generation_arguments.get(argument) is not None:
        raise ValueError(f"target_lang={target_lang!r} decides {argument}: give one of the two.")
    _check_languages(processing_class, "target", target_lang)
    codes = _each("target_lang", target_lang, sentences)
    return (language_id(processing_class, str(code)) for code in codes)


def _encode(
    model: Any,
    processing_class: ProcessingClass,
    sentences: Iterable[str],
    window: int,
    source_lang: str | Sequence[str] | None = None,
    source_prefix: str | Sequence[str] | None = None,
) -> Iterator[list[int]]:
    """Source ids of each sentence, [] for an empty one; reads exactly one window ahead; checks languages at once."""
    _check_languages(processing_class, "source", source_lang)
    if source_prefix is None:
        source_prefix = saved_prefix(processing_class)
    settings = model.config.to_dict()
    limit = settings.get("max_position_embeddings")
    if settings.get("position_embedding_type", "learned") != "learned":
        limit = None  # the other types count on without end
    vocab_size = model.get_encoder().get_input_embeddings().num_embeddings
    codes = _each("source_lang", source_lang, sentences)
    prefixes = _each("source_prefix", source_prefix, sentences)

    def run() -> Iterator[list[int]]:
        stream, line = iter(sentences), 0
        while chunk := list(islice(stream, window)):
            for number, sentence in enumerate(chunk, start=line + 1):
                if not isinstance(sentence, str):
                    raise ValueError(f"line {number} is {sentence!r}: each has to be a string.")
            texts = [f"{prefix}{sentence}" for sentence, prefix in zip(chunk, prefixes, strict=False)]
            encoded = encode_texts(processing_class, "source", texts, list(islice(codes, len(chunk))))
            for sentence, ids in zip(chunk, encoded, strict=True):
                line += 1
                if not sentence.strip():
                    ids = []
                where = f"line {line} ({sentence[:30] + '…' if len(sentence) > 30 else sentence!r})"
                if limit is not None and len(ids) > limit:
                    raise ValueError(
                        f"{where} has {len(ids)} tokens, but the model has learned positions for {limit}: "
                        "split it into shorter ones."
                    )
                if ids and max(ids) >= vocab_size:
                    raise ValueError(
                        f"{where} has the token id {max(ids)}, but the model's source vocabulary has the ids 0 to "
                        f"{vocab_size - 1}: the tokenizer does not belong to this model."
                    )
                yield ids

    return run()


@torch.no_grad()
def _decode_batch(
    model: Any,
    source_tokenizer,
    target_tokenizer,
    sources: list[list[int]],
    num_return_sequences: int,
    generation_arguments: dict[str, Any],
) -> list[list[Hypothesis]]:
    """Source ids of B sentences, none empty -> n hypotheses each, without scores."""
    batch = source_tokenizer.pad({"input_ids": sources}, return_tensors="pt").to(model.device)
    with evaluating(model):
        sequences = model.generate(  # (B * n, 1 + T), the start token first
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_return_sequences=num_return_sequences,
            **generation_arguments,
        )
    settings = model.generation_config.to_dict()
    settings |= {name: value for name, value in generation_arguments.items() if value is not None}
    lengths = _lengths(sequences[:, 1:], settings["eos_token_id"], settings["pad_token_id"])
    start_ids = sequences[:, 0].tolist()
    rows = [row[1 : 1 + length] for row, length in zip(sequences.tolist(), lengths.tolist(), strict=True)]
    texts = target_tokenizer.batch_decode(rows, skip_special_tokens=True)
    hypotheses = [Hypothesis(*parts) for parts in zip(texts, rows, start_ids, strict=True)]
    return [
        hypotheses[start : start + num_return_sequences] for start in range(0, len(hypotheses), num_return_sequences)
    ]


def _lengths(generated: torch.Tensor, eos: int | list[int] | None, pad: int | None) -> torch.Tensor:
    """Generated ids (B, T) -> (B,): how many count, up to and with the first `</s>`, or without padding at the end."""
    if eos is None:  # then nothing ends before the others, and nothing is padded
        return torch.full((len(generated),), generated.shape[1])
    ends = torch.isin(generated, torch.tensor(eos, device=generated.device))
    positions = torch.arange(1, generated.shape[1] + 1, device=generated.device)
    unpadded = ((generated != (-1 if pad is None else pad)) * positions).amax(dim=1)
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, unpadded)


@torch.no_grad()
def _score_batch(
    model: Any,
    source_tokenizer,
    sources: list[list[int]],
    outputs: list[list[Hypothesis]],
    length_penalty: float | None,
) -> None:
    """Write the scores of B sentences' outputs, by one teacher-forced pass.

    Asking `generate` for its scores instead would keep the logits of all steps and beams, and those of sampling are
    already filtered.
    """
    if length_penalty is None:
        length_penalty = model.generation_config.length_penalty
    if length_penalty is None:
        length_penalty = 1.0  # the default of generate()
    rows = [(ids, hypothesis) for ids, found in zip(sources, outputs, strict=True) for hypothesis in found]
    for _, hypothesis in rows:
        hypothesis.log_probability = hypothesis.score = 0.0
    rows = [(ids, hypothesis) for ids, hypothesis in rows if ids and hypothesis.token_ids]
    longest = max((len(hypothesis.token_ids) for _, hypothesis in rows), default=1)
    rows_at_once = max(1, LOGITS_AT_ONCE // (longest * model.config.vocab_size))
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        batch = source_tokenizer.pad({"input_ids": [ids for ids, _ in part]}, return_tensors="pt").to(model.device)
        labels = torch.nn.utils.rnn.pad_sequence(  # (B, T)
            [torch.tensor(hypothesis.token_ids) for _, hypothesis in part], batch_first=True, padding_value=-100
        ).to(model.device)
        # What generate() began with, which need not be what training begins with: a language code, an argument
        starts = torch.tensor([[hypothesis.start_id] for _, hypothesis in part], device=model.device)
        decoder_input_ids = torch.cat([starts, labels[:, :-1].clamp_min(0)], dim=1)
        found = label_log_probabilities(model, labels, **batch, decoder_input_ids=decoder_input_ids)
        for (_, hypothesis), total in zip(part, found.sum(dim=1).tolist(), strict=True):
            hypothesis.log_probability = total
            hypothesis.score = total / len(hypothesis.token_ids) ** length_penalty


@torch.no_grad()
def label_log_probabilities(model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Of each label (B, T) the log-probability (B, T) by one teacher-forced pass without dropout; 0 where it is -100.

    Args:
        inputs: of `forward`, the decoder's among them.
    """
    with evaluating(model):
        logits = model(**inputs, use_cache=False).logits  # (B, T, V); without labels the model computes no loss
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside; the caller's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
