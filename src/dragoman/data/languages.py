"""Texts of many languages to token ids: which codes a tokenizer has, and where a language's token stands.

Tokenizers trained here put it first, on both sides, as those of M2M100 and NLLB do: source `<en> tokens </s>`, target
`<it> tokens </s>`. So plain Transformers needs no more than

    inputs = tokenizer("<en>" + text, return_tensors="pt")
    model.generate(**inputs, forced_bos_token_id=tokenizer.convert_tokens_to_ids("<it>"))

The tokenizers of M2M100, NLLB and mBART are kept when a checkpoint is converted, and put their tokens themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dragoman.data.reading import Pairs, languages_of
from dragoman.data.tokenizers import ProcessingClass, language_token, source_and_target_tokenizer
from dragoman.models.pipeline_dragoman import language_ids
from dragoman.settings import did_you_mean


Side = Literal["source", "target"]
_ONE_AT_A_TIME = threading.Lock()
OF_CHECKPOINTS = ("M2M100Tokenizer", "NllbTokenizer", "MBart50Tokenizer", "MBartTokenizer")


def trained_languages(processing_class: ProcessingClass, side: Side) -> list[str]:
    """The codes of a tokenizer trained here; none of a checkpoint's."""
    tokenizer = source_and_target_tokenizer(processing_class)[side == "target"]
    return list(tokenizer.init_kwargs.get(f"{side}_languages", ()))


def languages(processing_class: ProcessingClass, side: Side) -> list[str]:
    """The codes of the languages of a side: `it` (trained here, M2M100), `ita_Latn` (NLLB), `it_IT` (mBART)."""
    return list(language_ids(source_and_target_tokenizer(processing_class)[side == "target"], side))


def default_language(processing_class: ProcessingClass, side: Side) -> str | None:
    """The language of a text that has none of its own: the only one, or what a checkpoint's tokenizer is set to."""
    tokenizer = source_and_target_tokenizer(processing_class)[side == "target"]
    if type(tokenizer).__name__ in OF_CHECKPOINTS:
        return tokenizer.src_lang if side == "source" else tokenizer.tgt_lang
    codes = languages(processing_class, side)
    return codes[0] if len(codes) == 1 else None


def check_language(processing_class: ProcessingClass, side: Side, code: str | None) -> None:
    """
    Raises:
        ValueError: a language for a side that has none, one that it does not have, or none where it must be chosen.
    """
    codes = languages(processing_class, side)
    name = "source_lang" if side == "source" else "target_lang"
    if code is None:
        if codes and default_language(processing_class, side) is None:
            raise ValueError(f"the model has several {side} languages: give {name}, one of {', '.join(codes)}")
    elif not codes:
        raise ValueError(f"{name} is {code!r}, but the model's tokenizer has no {side} languages: leave {name} out")
    elif code not in codes:
        raise ValueError(f"the tokenizer does not know the {side} language {code!r}: {did_you_mean(code, codes)}")


def encode_texts(
    processing_class: ProcessingClass, side: Side, texts: Sequence[str], codes: Sequence[str | None] | None = None
) -> list[list[int]]:
    """Token ids of texts, each with the token of its language where the side has languages, and with `</s>`.

    Args:
        codes: the language of each text; None where a side has none, or for the default one.

    Raises:
        ValueError: as `check_language`.
    """
    tokenizer = source_and_target_tokenizer(processing_class)[side == "target"]
    if codes is None:
        codes = [None] * len(texts)
    for code in dict.fromkeys(codes):
        check_language(processing_class, side, code)
    if type(tokenizer).__name__ in OF_CHECKPOINTS:
        rows: list[list[int]] = [[] for _ in texts]
        for code in dict.fromkeys(codes):
            numbers = [number for number, own in enumerate(codes) if own == code]
            chosen = [texts[number] for number in numbers]
            with _speaking(tokenizer, side, code):
                encoded = tokenizer(chosen) if side == "source" else tokenizer(text_target=chosen)
            for number, ids in zip(numbers, encoded.input_ids, strict=True):
                rows[number] = ids
        return rows
    known = languages(processing_class, side)
    if not known:
        return (tokenizer(list(texts)) if side == "source" else tokenizer(text_target=list(texts))).input_ids
    # The tokens of languages are ours to put: in the text their spellings are text, unless it has to be searched for
    # special tokens that the user reserved.
    of_languages = {language_token(code) for side in ("source", "target") for code in languages(processing_class, side)}
    only_languages = set(tokenizer.extra_special_tokens) <= of_languages
    encoded = tokenizer(list(texts), split_special_tokens=only_languages)
    default = default_language(processing_class, side)
    vocabulary = tokenizer.get_vocab()
    first = [vocabulary[language_token(str(code or default))] for code in codes]
    return [[token, *ids] for token, ids in zip(first, encoded.input_ids, strict=True)]


@contextmanager
def _speaking(tokenizer: PreTrainedTokenizerBase, side: Side, code: str | None) -> Iterator[None]:
    """A checkpoint's tokenizer set to a language, and back to what it was set to; one thread at a time."""
    attribute = "src_lang" if side == "source" else "tgt_lang"
    with _ONE_AT_A_TIME:
        before = tokenizer.src_lang if side == "source" else tokenizer.tgt_lang
        setattr(tokenizer, attribute, code or before)
        try:
            yield
        finally:
            setattr(tokenizer, attribute, before)


def set_languages(processing_class: ProcessingClass, pairs: Pairs) -> None:
    """Make the languages of these pairs those of the tokenizer: what it will be saved with.

    A tokenizer trained here gets those that it has tokens for, but knows from the other side alone. A checkpoint's is
    set to the language of a side if it is the same in all pairs.

    Raises:
        ValueError: there is no token for a language.
    """
    sides: list[tuple[Side, str]] = [("source", "src_lang"), ("target", "tgt_lang")]
    for side, attribute in sides:
        codes = languages_of(pairs, side)
        if not codes:
            continue
        tokenizer = source_and_target_tokenizer(processing_class)[side == "target"]
        known = trained_languages(processing_class, side)
        for code in codes:
            if language_token(code) not in tokenizer.extra_special_tokens:
                check_language(processing_class, side, code)
        if type(tokenizer).__name__ not in OF_CHECKPOINTS:
            tokenizer.init_kwargs[f"{side}_languages"] = sorted({*known, *codes})
        elif len(codes) == 1:
            setattr(tokenizer, attribute, codes[0])


def saved_prefix(processing_class: ProcessingClass) -> str:
    """What stands before every source text, saved with the tokenizer: "" or, as in T5, the name of the task."""
    tokenizer, _ = source_and_target_tokenizer(processing_class)
    return tokenizer.init_kwargs.get("source_prefix", "")


def save_prefix(processing_class: ProcessingClass, prefix: str | None) -> None:
    """Make this text stand before every source, also after saving and loading; None or "" for nothing."""
    tokenizer, _ = source_and_target_tokenizer(processing_class)
    tokenizer.init_kwargs.pop("source_prefix", None)
    if prefix:
        tokenizer.init_kwargs["source_prefix"] = prefix
