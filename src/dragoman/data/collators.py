"""Pairs of texts -> token ids (`encode_pairs`), and rows of token ids -> padded batches (`Seq2SeqCollator`).

Shapes: B batch, S longest source of the batch, T longest target of the batch, both with their final `</s>`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import IterableDataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from dragoman.data.languages import Side, check_language, encode_texts
from dragoman.data.reading import SETTING_COLUMNS, Pairs
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer


OVERLONG_POLICIES = ("error", "drop", "truncate")
EMPTY_POLICIES = ("error", "drop")
IGNORED_LABEL = -100
# Tokens of a packed row, if no pair is longer: enough to fill rows well, few enough for attention to stay cheap.
PACKED_LENGTH = 256
ENCODED_COLUMNS = ("input_ids", "labels", "length")


@dataclass
class DropReport:
    """What became of the pairs that went through `encode_pairs`; `str(report)` is a sentence.

    Attributes:
        kept: number of encoded pairs.
        dropped: number of dropped pairs by reason; a pair counts once, under the first reason that applies.
        truncated: number of kept pairs that were cut, by side.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lost = self.dropped.total()
        sentence = f"kept {self.kept:,} of {self.kept + lost:,} pairs"
        if lost:
            sentence += f"; dropped {lost:,}: " + _listed(self.dropped)
        if self.truncated:
            sentence += "; truncated: " + _listed(self.truncated)
        return sentence


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def encode_pairs(
    dataset: Pairs,
    processing_class: ProcessingClass,
    *,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    overlong: str = "error",
    empty: str = "error",
    num_proc: int | None = None,
    option_prefix: str | None = "",
) -> tuple[Pairs, DropReport]:
    """Turn text pairs into token ids.

    Args:
        dataset: columns `source` and `target`, as `read_pairs` gives them; where it has them also `source_lang` and
            `target_lang`, codes of languages, and `source_prefix`, text that is put before the source.
        processing_class: a tokenizer for both sides, or a `DragomanProcessor`.
        max_source_length, max_target_length: in tokens, the final `</s>` included; None is no limit.
        overlong: what to do with a pair of which a side is longer: `"error"`, `"drop"`, or `"truncate"` (but not the
            final token).
        empty: what to do with a pair of which a side has nothing but white space: `"error"` or `"drop"`.
        num_proc: processes; for map-style data only.
        option_prefix: what errors write before the options they advise, such as "data." for those of a file; None
            where the options are not the reader's to choose.

    Returns:
        The encoded data with the columns `input_ids` and `labels` (lists of ids that end with `</s>`) and `length`
        (tokens of the longer side, for sampling by length), and the report. For a stream the report counts while the
        stream is consumed, over all passes, and only in the process that consumes it.

    Raises:
        ValueError: an overlong or empty pair where the policy is `"error"`, naming the pair (for streams during the
            iteration); not a single pair kept (not for streams); an unknown policy; a tokenizer that does not end its
            output with `</s>`.
    """
    for name, value, choices in (("overlong", overlong, OVERLONG_POLICIES), ("empty", empty, EMPTY_POLICIES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(choices)}")
    for name, limit in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
        if limit is not None and limit < 2:
            raise ValueError(f"{name} is {limit}; it must be at least 2, one token and the end of the sequence")
    for tokenizer in source_and_target_tokenizer(processing_class):
        _require_final_eos(tokenizer)
    encoder = _Encoder(processing_class, max_source_length, max_target_length, overlong, empty, option_prefix)
    report = DropReport()
    if isinstance(dataset, IterableDataset):
        if num_proc is not None:
            raise ValueError("num_proc is for map-style data; a stream is encoded where it is consumed")
        return _encode_stream(dataset, encoder, report), report

    outcomes = dataset.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Encoding pairs",
    )
    # By Arrow, which maps the columns into memory: there may be more pairs than Python can hold objects of.
    what = outcomes.select_columns(["dropped", "truncated"]).with_format("arrow")[:]
    for group in what.group_by(["dropped", "truncated"]).aggregate([([], "count_all")]).to_pylist():
        _count(report, group["dropped"], group["truncated"], group["count_all"])
    if not report.kept:
        raise ValueError(f"no pair is left to train or evaluate on: {report}")
    encoded = outcomes.select_columns(list(ENCODED_COLUMNS))
    if report.kept == len(encoded):
        return encoded, report
    return encoded.select(np.flatnonzero(pc.equal(what["dropped"], "").to_numpy())), report


def _encode_stream(dataset: IterableDataset, encoder: _Encoder, report: DropReport) -> IterableDataset:
    names = dataset.column_names or list(next(iter(dataset)))

    def encode_and_filter(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        for name in SETTING_COLUMNS:
            if (name in batch) != (name in names):
                number = indices[0] + 1 if name in names else 1
                raise ValueError(f"pair {number} has no {name}, which other pairs have")
        outcome = encoder(batch, indices)
        for dropped, truncated in zip(outcome["dropped"], outcome["truncated"], strict=True):
            _count(report, dropped, truncated)
        kept = [row for row, reason in enumerate(outcome["dropped"]) if not reason]
        # Any row may have columns that none had before, so `remove_columns` cannot name them all.
        replaced = dict.fromkeys(batch, [None] * len(kept))
        return replaced | {column: [outcome[column][row] for row in kept] for column in ENCODED_COLUMNS}

    encoded = dataset.map(encode_and_filter, batched=True, with_indices=True)
    return encoded.select_columns(list(ENCODED_COLUMNS))


def _count(report: DropReport, dropped: str, truncated: str, pairs: int = 1) -> None:
    """Pairs that were dropped for this reason, or else cut on these sides, if the texts are not empty."""
    if dropped:
        report.dropped[dropped] += pairs
    else:
        report.kept += pairs
        if truncated:
            report.truncated[truncated] += pairs


def _require_final_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(text_target="a").input_ids
    if tokenizer.eos_token_id not in ids[-2:]:  # mBART has the code of the language behind it
        raise ValueError(
            f"the tokenizer does not end its output with its end-of-sequence token {tokenizer.eos_token!r}, "
            "so a model trained with it would never learn to stop; add the token in its post-processor"
        )


@dataclass
class _Encoder:
    """Encodes a batch of rows; a class so that worker processes can receive it."""

    processing_class: ProcessingClass
    max_source_length: int | None
    max_target_length: int | None
    overlong: str
    empty: str
    option_prefix: str | None

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encode; `dropped` is the reason to drop a row, `truncated` names the sides cut, or they are empty."""
        source_tokenizer, _ = source_and_target_tokenizer(self.processing_class)
        for name in SETTING_COLUMNS:
            if None in batch.get(name, ()):
                raise ValueError(f"pair {indices[batch[name].index(None)] + 1} has no {name}, which other pairs have")
        prefixes = batch.get("source_prefix") or [""] * len(indices)
        prefixed = [prefix + source for prefix, source in zip(prefixes, batch["source"], strict=True)]
        outcome: dict[str, list[Any]] = {name: [] for name in (*ENCODED_COLUMNS, "dropped", "truncated")}
        rows = zip(
            indices,
            batch["source"],
            batch["target"],
            self._encode("source", prefixed, batch, indices),
            self._encode("target", batch["target"], batch, indices),
            strict=True,
        )
        for index, source, target, input_ids, labels in rows:
            sides = (
                ("source", source, input_ids, self.max_source_length),
                ("target", target, labels, self.max_target_length),
            )
            dropped, cut = "", []
            for side, text, ids, limit in sides:
                where = f"pair {index + 1} ({source[:40]!r} / {target[:40]!r})"
                if not text.strip():
                    if self.empty == "error":
                        raise ValueError(
                            f"{where}: the {side} is empty" + self._advice("set {}empty=drop to leave such pairs out")
                        )
                    dropped = dropped or f"with an empty {side}"
                elif limit is not None and len(ids) > limit:
                    if self.overlong == "error":
                        raise ValueError(
                            f"{where}: the {side} has {len(ids)} tokens and max_{side}_length is {limit}"
                            + self._advice("set {}overlong=drop or {}overlong=truncate, or raise the limit")
                        )
                    if self.overlong == "drop":
                        dropped = dropped or f"with a {side} longer than {limit} tokens"
                    else:
                        ending = 1 if ids[-1] == source_tokenizer.eos_token_id else 2  # and a language code
                        del ids[limit - ending : -ending]
                        cut.append(side)
            outcome["input_ids"].append(input_ids)
            outcome["labels"].append(labels)
            outcome["length"].append(max(len(input_ids), len(labels)))
            outcome["dropped"].append(dropped)
            outcome["truncated"].append(" and ".join(cut))
        return outcome

    def _encode(self, side: Side, texts: list[str], batch: dict[str, list[Any]], indices: list[int]) -> list[list[int]]:
        codes = batch.get(f"{side}_lang") or [None] * len(texts)
        for code in dict.fromkeys(codes):
            try:
                check_language(self.processing_class, side, code)
            except ValueError as error:
                raise ValueError(f"pair {indices[codes.index(code)] + 1}: {error}") from error
        return encode_texts(self.processing_class, side, texts, codes)

    def _advice(self, sentence: str) -> str:
        if self.option_prefix is None:
            return ""
        return "; " + sentence.replace("{}", self.option_prefix)


class Seq2SeqCollator(DataCollatorForSeq2Seq):
    """Pad encoded pairs to a batch.

    Args:
        processing_class: the tokenizer or `DragomanProcessor` that encoded the pairs; its padding token is used.
        model: if given, its vocabulary sizes check the ids, and its `prepare_decoder_input_ids_from_labels` makes the
            decoder inputs.
        **kwargs: as `DataCollatorForSeq2Seq`: `padding`, `max_length`, `pad_to_multiple_of`, `return_tensors`.

    Calling it with rows of `input_ids` and `labels` (and anything else the model takes; `length` is left out) gives
    `input_ids (B,S)`, `attention_mask (B,S)`, `labels (B,T)` padded with -100, and with a model also
    `decoder_input_ids (B,T)`.

    Raises:
        ValueError: (in the call) an id outside the model's source or target vocabulary.
    """

    def __init__(self, processing_class: ProcessingClass, model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        source_tokenizer, _ = source_and_target_tokenizer(processing_class)
        super().__init__(source_tokenizer, model=model, label_pad_token_id=IGNORED_LABEL, **kwargs)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        rows = [{name: value for name, value in row.items() if name != "length"} for row in features]
        if self.model is not None:
            source_size = self.model.get_encoder().get_input_embeddings().num_embeddings
            _check_ids(rows, "input_ids", "source", source_size)
            _check_ids(rows, "labels", "target", self.model.config.vocab_size)
        batch = super().__call__(rows, return_tensors)
        if batch["labels"] is None:
            del batch["labels"]
        return batch


class PackingCollator(Seq2SeqCollator):
    """Put several pairs into each row, so that hardly any padding is left.

    Rows are as long as `PACKED_LENGTH` or the longest pair of the batch, on each side. Which pairs share a row is
    decided first-fit, the longest pair first; the loss does not depend on it.

    Args:
        processing_class: as in `Seq2SeqCollator`.
        model: of the Transformer family; its `prepare_decoder_input_ids_from_labels` makes the decoder inputs.

    Calling it gives `input_ids (B,S)`, `labels (B,T)`, `decoder_input_ids (B,T)`, and `segment_ids (B,S)` and
    `decoder_segment_ids (B,T)`: numbers of the pairs in a row from 1 on, by which the model keeps them apart and begins
    to count positions anew. Source padding is segment 0; target padding belongs to the row's last pair, whose end it
    comes after.
    """

    def __init__(self, processing_class: ProcessingClass, model: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(processing_class, model=model, **kwargs)
        learned = model.config.position_embedding_type == "learned"
        self.row_length = min(PACKED_LENGTH, model.config.max_position_embeddings) if learned else PACKED_LENGTH

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        batch = super().__call__(features, return_tensors)
        real_source, real_target = batch["attention_mask"].bool(), batch["labels"] != IGNORED_LABEL
        sources, targets = real_source.sum(dim=1), real_target.sum(dim=1)
        places, sizes = self._pack(sources.tolist(), targets.tolist())
        rows, numbers, source_starts, target_starts = torch.tensor(places).unbind(dim=1)
        width, height = max(source for _, source, _ in sizes), max(target for _, _, target in sizes)

        def spread(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Row and column of each token, pair after pair."""
            before = lengths.cumsum(dim=0) - lengths
            column = torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
            return rows.repeat_interleave(lengths), column

        source_at, target_at = spread(source_starts, sources), spread(target_starts, targets)
        padding = self.tokenizer.pad_token_id
        packed = {
            "input_ids": batch["input_ids"].new_full((len(sizes), width), padding),
            "segment_ids": torch.zeros(len(sizes), width, dtype=torch.long),
            "labels": batch["labels"].new_full((len(sizes), height), IGNORED_LABEL),
            "decoder_input_ids": batch["labels"].new_full((len(sizes), height), padding),
            "decoder_segment_ids": torch.tensor([[pairs] for pairs, _, _ in sizes]).repeat(1, height),
        }
        packed["input_ids"][source_at] = batch["input_ids"][real_source]
        packed["segment_ids"][source_at] = numbers.repeat_interleave(sources)
        packed["labels"][target_at] = batch["labels"][real_target]
        packed["decoder_input_ids"][target_at] = batch["decoder_input_ids"][real_target]
        packed["decoder_segment_ids"][target_at] = numbers.repeat_interleave(targets)
        return packed

    def _pack(
        self, sources: list[int], targets: list[int]
    ) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]]:
        """For each pair its row, its number there and where its sides begin; for each row its pairs and tokens."""
        most_source, most_target = max(self.row_length, *sources), max(self.row_length, *targets)
        places = [(0, 0, 0, 0)] * len(sources)
        sizes: list[tuple[int, int, int]] = []
        for pair in sorted(range(len(sources)), key=lambda pair: -max(sources[pair], targets[pair])):
            room = (
                row
                for row, (_, source, target) in enumerate(sizes)
                if source + sources[pair] <= most_source and target + targets[pair] <= most_target
            )
            row = next(room, len(sizes))
            if row == len(sizes):
                sizes.append((0, 0, 0))
            pairs, source, target = sizes[row]
            places[pair] = (row, pairs + 1, source, target)
            sizes[row] = (pairs + 1, source + sources[pair], target + targets[pair])
        return places, sizes


def _check_ids(rows: list[dict[str, Any]], name: str, side: str, vocab_size: int) -> None:
    for number, row in enumerate(rows, start=1):
        if name not in row:
            continue
        ids = torch.as_tensor(row[name])
        ids = ids[ids != IGNORED_LABEL] if name == "labels" else ids
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"{name} of row {number} of the batch hold the token id {int(outside[0])}, but the model's {side} "
                f"vocabulary has the ids 0 to {vocab_size - 1}: the tokenizer and the model do not belong together"
            )
