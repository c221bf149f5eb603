"""How probable a model finds given targets: to rerank, to filter, to find pairs that do not belong together."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO, cast

from datasets import Dataset
from transformers import PreTrainedModel

from dragoman.data.batching import map_in_batches
from dragoman.data.collators import IGNORED_LABEL, Seq2SeqCollator, encode_pairs
from dragoman.data.languages import saved_prefix
from dragoman.data.reading import with_settings
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.inference.translate import LOGITS_AT_ONCE, label_log_probabilities


@dataclass
class TargetScore:
    """What a model says of one target, given its source.

    Attributes:
        score: what beam search ranks by: `log_probability / length ** length_penalty`, length being the number of
            tokens. With the usual length penalty 1 it is the mean log-probability of a token.
        log_probability: natural logarithm of the probability of the whole target: the sum over its tokens.
        tokens: the target's tokens as its tokenizer spells them, the final `</s>` included.
        token_log_probabilities: of each token, given the source and the tokens before it.
    """

    score: float
    log_probability: float
    tokens: list[str]
    token_log_probabilities: list[float]


def score(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    pairs: Dataset,
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
    source_prefix: str | None = None,
    batch_size: int = 32,
    length_penalty: float | None = None,
    window: int = 10_000,
) -> Iterator[TargetScore]:
    """Score the targets of pairs by teacher forcing, without label smoothing or dropout.

    A hypothesis of `generate` gets the score that beam search gave it, as long as its text encodes to the tokens that
    were generated and nothing changed their probabilities (temperature, penalties, forced tokens).

    Args:
        model, processing_class: as `load` gives them.
        pairs: as `read_pairs` gives them, or `Dataset.from_dict({"source": [...], "target": [...]})`; encoded as for
            training.
        source_lang, target_lang, source_prefix: as in `translate`, for every pair; columns of these names are used
            without being given here.
        batch_size: pairs scored together; they are sorted by length first. Long targets make batches smaller.
        length_penalty: exponent of the length in `score`; None takes the model's own, which is 1 unless set.
        window: pairs sorted together; the first result comes after so many.

    Returns:
        an iterator over the score of each pair, in their order. The arguments are checked at once.

    Raises:
        ValueError: a pair with an empty side; a language that the model does not have; a tokenizer whose ids the model
            does not have; a side that is longer than the model's learned positions.
    """
    if length_penalty is None:
        length_penalty = model.generation_config.length_penalty
    exponent = 1.0 if length_penalty is None else length_penalty  # 1.0: the default of generate()
    if source_prefix is None and "source_prefix" not in pairs.column_names:
        source_prefix = saved_prefix(processing_class) or None
    settings = {"source_lang": source_lang, "target_lang": target_lang, "source_prefix": source_prefix}
    encoded, _ = encode_pairs(with_settings(pairs, "the pairs", **settings), processing_class, option_prefix=None)
    collator = Seq2SeqCollator(processing_class, model)
    _, target_tokenizer = source_and_target_tokenizer(processing_class)

    def score_batch(rows: list[dict[str, Any]]) -> list[TargetScore]:
        found = []
        for row, values in zip(rows, _token_log_probabilities(model, collator(rows)), strict=True):
            total = sum(values)
            tokens = cast(list[str], target_tokenizer.convert_ids_to_tokens(row["labels"]))
            found.append(TargetScore(total / len(tokens) ** exponent, total, tokens, values))
        return found

    return map_in_batches(
        cast(Dataset, encoded),
        score_batch,
        length=lambda row: row["length"],
        batch_size=batch_size,
        max_tokens=max(1, LOGITS_AT_ONCE // model.config.vocab_size),
        window=window,
    )


def write_table(pairs: Dataset, scores: Iterable[TargetScore], file: TextIO, header: bool = True) -> None:
    """Write a line a pair: score, log-probability, source, target; with the heading `read_pairs` reads it as `.tsv`."""
    if header:
        print("score", "log_probability", "source", "target", sep="\t", file=file)
    for pair, one in zip(pairs, scores, strict=True):
        texts = [" ".join(re.split(r"[\t\r\n]", pair[side])) for side in ("source", "target")]
        print(f"{one.score:.4f}", f"{one.log_probability:.4f}", *texts, sep="\t", file=file)


def write_jsonl(pairs: Dataset, scores: Iterable[TargetScore], file: TextIO) -> None:
    """Write an object a line: the columns of the pair and the fields of `TargetScore`."""
    for pair, one in zip(pairs, scores, strict=True):
        print(json.dumps({**pair, **asdict(one)}, ensure_ascii=False), file=file)


def _token_log_probabilities(model: Any, batch: Any) -> list[list[float]]:
    """A batch of the collator -> the log-probability of each label that is not padding."""
    batch = {name: values.to(model.device) for name, values in batch.items()}
    found = label_log_probabilities(model, **batch)
    return [row[kept].tolist() for row, kept in zip(found, batch["labels"] != IGNORED_LABEL, strict=True)]
