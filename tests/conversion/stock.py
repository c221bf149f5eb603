"""Tiny stock checkpoints: the models of `scripts/parity.py`, and tokenizers of each kind for one sentence's letters."""

import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import transformers

from commands import load_script
from dragoman.conversion import convert


parity = load_script("parity")


def case_of(family: str, **values: str):
    """The first case of a family whose switches have these values."""
    return next(
        case
        for case in parity.CASES
        if case.family == family and all(case.value(switch) == value for switch, value in values.items())
    )


def save(case, folder: Path, **changes) -> Path:
    """A stock checkpoint in a new folder."""
    case.build(**changes).save_pretrained(folder)
    return folder


def converted(case, folder: Path, **changes) -> Path:
    """A stock checkpoint in `folder/stock`, and what it becomes, which is returned."""
    return convert(save(case, folder / "stock", **changes), folder / "converted").folder


def edit_config(folder: Path, **changes) -> None:
    """Change keys of a config.json; None takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# ---------------------------------------------------------------- tokenizers

SENTENCE = "the cat sleeps in a red house near the sea why not"
LETTERS = sorted(set(SENTENCE) - {" "})
PIECES = [("▁", -2.0), *((letter, -3.0) for letter in LETTERS), *(("▁" + letter, -3.5) for letter in LETTERS)]


def _numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _scored(*specials: str) -> list[tuple[str, float]]:
    return [(token, 0.0) for token in specials] + PIECES


def _sentencepiece(path: Path) -> list[str]:
    """Trains a model and gives its pieces, those of the specials left out."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([SENTENCE, *SENTENCE.split()]), model_writer=file, vocab_size=len(LETTERS) + 8,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(number) for number in range(3, model.get_piece_size())]


def _marian(folder: Path, separate: bool = False):
    source, target, vocab, target_vocab = (
        folder / name for name in ("source.spm", "target.spm", "vocab.json", "target_vocab.json")
    )
    pieces = _sentencepiece(source)
    _sentencepiece(target)
    pieces += [f"piece{number}" for number in range(len(pieces), 37)]  # so that <pad> is 40, as in the model
    vocab.write_text(json.dumps(_numbered("</s>", "<unk>", ">>it<<", *pieces, "<pad>")))
    settings = {}
    if separate:
        target_vocab.write_text(json.dumps(_numbered("</s>", "<unk>", *reversed(pieces), ">>it<<", "<pad>")))
        settings = {"separate_vocabs": True, "target_vocab_file": str(target_vocab)}
    return transformers.MarianTokenizer(str(source), str(target), str(vocab), **settings)


def _m2m100(folder: Path):
    pieces = _sentencepiece(folder / "spm.model")
    (folder / "vocab.json").write_text(json.dumps(_numbered("<s>", "<pad>", "</s>", "<unk>", *pieces)))
    return transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"), "en", "it")


def _byte_pairs(tokenizer_class):
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return lambda folder: tokenizer_class(vocab=_numbered(*specials, "Ġ", *LETTERS), merges=[])


FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
# Name -> family, ids that its model must have, and what makes it; the folder is for files that it wants to read.
TOKENIZERS: dict[str, tuple[str, int, Callable]] = {
    "marian": ("marian", 41, _marian),
    "marian with two vocabularies": ("marian", 41, lambda folder: _marian(folder, separate=True)),
    "m2m100": ("m2m_100", 140, _m2m100),
    "nllb": (
        "m2m_100",
        260,
        lambda folder: transformers.NllbTokenizer(
            vocab=_numbered(*FAIRSEQ, *(piece for piece, _ in PIECES)), merges=[],
            src_lang="eng_Latn", tgt_lang="ita_Latn",
        ),
    ),
    "mbart": (
        "mbart",
        80,
        lambda folder: transformers.MBartTokenizer(
            vocab=[*_scored(*FAIRSEQ), ("en_XX", 0.0), ("it_IT", 0.0)], src_lang="en_XX", tgt_lang="it_IT"
        ),
    ),
    "mbart50": (
        "mbart",
        100,
        lambda folder: transformers.MBart50Tokenizer(vocab=_scored(*FAIRSEQ), src_lang="en_XX", tgt_lang="it_IT"),
    ),
    "t5": ("t5", 41, lambda folder: transformers.T5Tokenizer(vocab=_scored("<pad>", "</s>", "<unk>"), extra_ids=3)),
    "mt5": ("mt5", 41, lambda folder: transformers.T5Tokenizer(vocab=_scored("<pad>", "</s>", "<unk>"), extra_ids=3)),
    "pegasus": (
        "pegasus",
        41,
        lambda folder: transformers.PegasusTokenizer(
            vocab=_scored("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"), offset=3
        ),
    ),
    "bart": ("bart", 41, _byte_pairs(transformers.BartTokenizer)),
    "blenderbot": ("blenderbot", 41, _byte_pairs(transformers.BlenderbotTokenizer)),
}  # fmt: skip


def save_with_tokenizer(name: str, folder: Path, **changes):
    """A stock checkpoint with this tokenizer in a new folder -> the tokenizer."""
    family, vocab_size, make = TOKENIZERS[name]
    (folder / "files").mkdir(parents=True)
    tokenizer = make(folder / "files")
    tokenizer.save_pretrained(folder)
    case = case_of(family, **({"vocabularies": "one"} if family == "marian" else {}))
    save(case, folder, vocab_size=vocab_size, **changes)
    return tokenizer
