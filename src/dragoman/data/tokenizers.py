"""Tokenizers trained on the data at hand, which `AutoTokenizer` (or `AutoProcessor`) loads without this package.

Special tokens have the same ids everywhere: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3. Padding is not 0, because the
stock beam search mishandles that. An encoded text is its tokens and `</s>`, for sources and targets alike.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

from datasets import IterableDataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from dragoman.data.reading import Pairs, languages_of
from dragoman.models.processing_dragoman import DragomanProcessor
from dragoman.settings import one_line


logger = logging.getLogger(__name__)

BOS, PAD, EOS, UNK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BYTES = 256
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


def language_token(code: str) -> str:
    """The special token of a language: `it` -> `<it>`."""
    return f"<{code}>"


def train_tokenizer(
    texts: Iterable[str],
    kind: str = "bpe",
    vocab_size: int = 8000,
    extra_special_tokens: Sequence[str] = (),
    *,
    source_languages: Sequence[str] = (),
    target_languages: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer. The same texts in the same order give the same tokenizer.

    For `"unigram"` that is so but for ties between pieces: where two are equally useful, the trainer of `tokenizers`
    leaves it to chance which of them it keeps.

    Args:
        texts: sentences.
        kind: one of
            - `"bpe"`: byte-level byte-pair encoding (Sennrich 2016; bytes as in GPT-2): any text, nothing is unknown,
              decodes to exactly what was encoded;
            - `"unigram"`: Unigram language model (Kudo 2018) with `▁` for a space: unseen characters become `<unk>`;
            - `"word"`: what stands between white space (phonemes, or text that is tokenized already): unseen words
              become `<unk>`;
            - `"char"`: characters, decodes to exactly what was encoded as long as the characters were seen.
        vocab_size: wanted number of ids, special tokens included. Texts that cannot fill it give a smaller vocabulary,
            with a warning for the two kinds that learn pieces; for `word` and `char` it is only an upper limit: the
            most frequent entries stay.
        extra_special_tokens: further reserved tokens with the ids from 4 on, for example language codes `>>it<<`.
            Where there are none, `<s>` and the like in a text are read as ordinary text. Where there are some, a text
            is searched for special tokens, so that `">>it<< hello"` begins with the code.
        source_languages, target_languages: codes of the languages of each side. Their tokens (`language_token`) are
            special, and the codes are saved with the tokenizer, for `encode_texts` and all that encodes and decodes.

    Returns:
        A tokenizer with `len(tokenizer)` ids.

    Raises:
        ValueError: unknown kind, a vocabulary too small for its kind, a repeated special token, or no text.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of tokenizer is {kind!r}; it can be {', '.join(KINDS)}")
    tokens = [language_token(code) for code in sorted({*source_languages, *target_languages})]
    extra = [*(token for token in extra_special_tokens if token not in tokens), *tokens]
    reserved = [*SPECIAL_TOKENS, *extra]
    if len(set(reserved)) != len(reserved):
        raise ValueError(f"special tokens must differ from each other and from {', '.join(SPECIAL_TOKENS)}: {reserved}")
    minimum = len(reserved) + (BYTES if kind == "bpe" else 1)
    if vocab_size < minimum:
        reason = f" and the {BYTES} bytes" if kind == "bpe" else " and one entry"
        raise ValueError(
            f"vocab_size is {vocab_size}, but a {kind} tokenizer needs at least {minimum}: "
            f"{len(reserved)} special tokens{reason}"
        )
    backend, trainer = KINDS[kind](vocab_size, reserved)
    try:
        backend.train_from_iterator(_refuse_emptiness(texts), trainer)
    except Exception as error:
        if kind == "unigram" and "vocabulary" in str(error).lower():
            raise ValueError(f"vocab_size {vocab_size} is too small for a unigram tokenizer here: {error}") from error
        raise
    if kind == "unigram":
        _sort_unigram(backend, len(reserved))
    size = backend.get_vocab_size()
    if size < vocab_size and kind in ("bpe", "unigram"):
        logger.warning(
            "the texts yield a %s vocabulary of only %d of the %d tokens asked for; with so little text, characters "
            "(tokenizer.kind=char) are often the better tokens",
            kind,
            size,
            vocab_size,
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
    )
    languages = {"source_languages": source_languages, "target_languages": target_languages}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=extra,
        split_special_tokens=not extra,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **{name: list(codes) for name, codes in languages.items() if codes},
    )


def build_tokenizer(
    dataset: Pairs,
    *,
    kind: str = "bpe",
    vocab_size: int = 8000,
    joint: bool = True,
    target_kind: str | None = None,
    target_vocab_size: int | None = None,
    extra_special_tokens: Sequence[str] = (),
    max_pairs: int | None = None,
) -> PreTrainedTokenizerFast | DragomanProcessor:
    """Train the tokenizer(s) of a set of pairs, as `read_pairs` gives them. A stream is read once per tokenizer.

    Languages are collected from the columns `source_lang` and `target_lang`, task prefixes from `source_prefix`.
    Memory grows with the number of different words, and where words are not spaced a sentence is a word.

    Args:
        joint: one vocabulary for both sides, trained on sources and targets; else a `DragomanProcessor` of two.
        target_kind, target_vocab_size: where the target's differ from `kind` and `vocab_size`; only with `joint=False`.
        max_pairs: train on no more than so many pairs, evenly spaced; in a stream, on the first ones of every file.

    Raises:
        ValueError: as `train_tokenizer`, or target settings with a joint vocabulary, or no pairs allowed.
    """
    if joint and (target_kind is not None or target_vocab_size is not None):
        raise ValueError("a joint vocabulary has no target_kind or target_vocab_size; they are for joint=False")
    codes = {f"{side}_languages": sorted(languages_of(dataset, side)) for side in ("source", "target")}
    parts = [dataset] if max_pairs is None else _sample(dataset, max_pairs)
    if joint:
        texts = _column_texts(parts, "source", "target")
        return train_tokenizer(texts, kind, vocab_size, extra_special_tokens, **codes)
    of_source, of_target = ({name: codes[name]} for name in codes)
    return DragomanProcessor(
        train_tokenizer(_column_texts(parts, "source"), kind, vocab_size, extra_special_tokens, **of_source),
        train_tokenizer(
            _column_texts(parts, "target"),
            target_kind or kind,
            target_vocab_size or vocab_size,
            extra_special_tokens,
            **of_target,
        ),
    )


def load_tokenizer(folder: str | Path) -> ProcessingClass:
    """Load what a checkpoint was trained with: a tokenizer, or a `DragomanProcessor` when it has two vocabularies.

    Raises:
        FileNotFoundError: there is no tokenizer in the folder.
        ValueError: one of its files is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer (tokenizer_config.json is missing)")
    try:
        if (folder / "target_tokenizer").is_dir():
            return DragomanProcessor.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    except ValueError as error:
        if not (folder / "tokenizer.json").is_file():
            problem = "tokenizer.json is missing, and nothing that it could be made of can be read"
        else:
            problem = f"a file is damaged: {one_line(error)}"
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {problem}") from error


def source_and_target_tokenizer(
    processing_class: ProcessingClass,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers of the two sides: those of a processor, or twice the same."""
    if isinstance(processing_class, ProcessorMixin):
        processor = cast(DragomanProcessor, processing_class)
        return processor.tokenizer, processor.target_tokenizer
    return processing_class, processing_class


def _spelled_out(reserved: list[str]) -> pre_tokenizers.PreTokenizer:
    """Splits "<s>" and the like behind the "<": they are entries of the vocabulary, which a text must not reach."""
    rest = "|".join(re.escape(token[1:]) for token in reserved if token.startswith("<"))
    return pre_tokenizers.Split(Regex(f"<(?={rest})"), behavior="isolated")


def _byte_level_bpe(vocab_size: int, reserved: list[str]) -> tuple[Tokenizer, trainers.Trainer]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend, trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=reserved,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _unigram(vocab_size: int, reserved: list[str]) -> tuple[Tokenizer, trainers.Trainer]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), _spelled_out(reserved)])
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=reserved, unk_token=UNK, show_progress=False
    )


def _sort_unigram(backend: Tokenizer, reserved: int) -> None:
    """Take the trainer's hash order out of a Unigram: it is in the ids, in rounding errors, and in some scores.

    Those are the scores of characters that the trainer pruned and adds again at the end, in small steps downwards.
    """
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    scores = {piece: round(score, 6) for piece, score in vocab[reserved:]}
    lowest = min((score for piece, score in scores.items() if len(piece) > 1), default=0.0)
    rare = sorted(piece for piece, score in scores.items() if len(piece) == 1 and score < lowest)
    scores |= zip(rare, sorted((scores[piece] for piece in rare), reverse=True), strict=True)
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    specials = [(token, score) for token, score in vocab[:reserved]]
    backend.model = models.Unigram(specials + pieces, unk_id=SPECIAL_TOKENS.index(UNK))


def _word(vocab_size: int, reserved: list[str]) -> tuple[Tokenizer, trainers.Trainer]:
    backend = Tokenizer(models.WordLevel(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), _spelled_out(reserved)])
    return backend, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=reserved, show_progress=False)


def _char(vocab_size: int, reserved: list[str]) -> tuple[Tokenizer, trainers.Trainer]:
    backend = Tokenizer(models.WordLevel(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=reserved, show_progress=False)


KINDS: dict[str, Callable[[int, list[str]], tuple[Tokenizer, trainers.Trainer]]] = {
    "bpe": _byte_level_bpe,
    "unigram": _unigram,
    "word": _word,
    "char": _char,
}


def _sample(dataset: Pairs, size: int) -> list[Pairs]:
    """Parts of the pairs that together are at most as many, from all over the data."""
    if size < 1:
        raise ValueError(f"max_pairs is {size}; it must be at least 1")
    if not isinstance(dataset, IterableDataset):
        return [dataset.select(range(0, len(dataset), -(-len(dataset) // size)))]
    files = dataset.num_shards
    shares = [size // files + (number < size % files) for number in range(files)]
    return [dataset.shard(files, number).take(share) for number, share in enumerate(shares)]


def _column_texts(parts: Sequence[Pairs], *columns: str) -> Iterator[str]:
    for batch in chain.from_iterable(part.iter(batch_size=1000) for part in parts):
        for column in columns:
            if column == "source":
                # Each once: they need not be frequent. Of a row without one, its encoding will tell.
                yield from filter(None, dict.fromkeys(batch.get("source_prefix", ())))
            yield from batch[column]


def _refuse_emptiness(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise ValueError("there is no text to train a tokenizer on")
