import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dragoman.data.reading import read_pairs, with_settings
from dragoman.data.tokenizers import (
    SPECIAL_TOKENS,
    build_tokenizer,
    load_tokenizer,
    source_and_target_tokenizer,
    train_tokenizer,
)
from dragoman.models.processing_dragoman import DragomanProcessor


TEXTS = ["the cat sat on the mat", "the dog sat on the log", "我爱你", "  two  spaces ", "caffè 😀"] * 3
KINDS = {"bpe": 290, "unigram": 40, "word": 19, "char": 35}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return train_tokenizer(TEXTS, kind, KINDS[kind])


def test_ids_and_endings(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    source = tokenizer("the cat sat", text_target="the dog")
    for row in (source["input_ids"], source["labels"]):
        assert row[-1] == 2
        assert set(row[:-1]).isdisjoint({0, 1, 2, 3})
    assert tokenizer("").input_ids == [2]
    assert set(source) == {"input_ids", "attention_mask", "labels"}, "no token types"
    assert tokenizer(["the cat", "the"], padding=True).input_ids[1][-1] == 1, "padded on the right"


@pytest.mark.parametrize("text", ["the cat sat on the log", "我爱你", "caffè 😀"])
def test_seen_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["  two  spaces ", " the cat", "the  "])
@pytest.mark.parametrize("kind", ["bpe", "char"], scope="module")
def test_spaces_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def byte_level():
    return train_tokenizer(TEXTS, "bpe", KINDS["bpe"])


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_byte_level_bpe_returns_any_text(byte_level, text):
    ids = byte_level(text).input_ids
    assert 3 not in ids
    assert byte_level.decode(ids, skip_special_tokens=True) == text
    assert byte_level.decode(ids) == text + "</s>"


@pytest.mark.parametrize("text", ["a <s> b </s> c", "</s>", "<s>x</s><pad><unk>"])
def test_special_tokens_in_a_text_are_only_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert set(ids[:-1]).isdisjoint({0, 1, 2})


def test_unknown_pieces(kind, tokenizer):
    ids = tokenizer("Ж").input_ids
    assert (3 in ids) == (kind != "bpe")


def test_phonemes_are_words():
    tokenizer = train_tokenizer(["IH K S K R IY T IH D"], "word", 50)
    assert len(tokenizer) == 4 + 7
    assert tokenizer.convert_ids_to_tokens(tokenizer("K IH D").input_ids) == ["K", "IH", "D", "</s>"]
    assert tokenizer.decode(tokenizer("K IH D").input_ids, skip_special_tokens=True) == "K IH D"


def test_auto_tokenizer_loads_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["the cat", "</s>", " 😀 . it 's", "我爱你"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    for text in texts:
        ids = loaded(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert type(load_tokenizer(tmp_path)) is type(loaded)
    assert not list(tmp_path.glob("*.py")), "no code has to be trusted"
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(tokenizer_config\.json is missing\)"):
        load_tokenizer(tmp_path / "nowhere")


def test_training_again_gives_the_same(kind):
    texts = read_pairs("embedded:tiny_en_it/validation")["target"]
    # Hash orders differ between two trainers of one process already.
    runs = {train_tokenizer(texts, kind, 400).backend_tokenizer.to_str() for _ in range(3)}
    assert len(runs) == 1


def test_sizes(caplog):
    assert len(train_tokenizer(TEXTS, "bpe", 270)) == 270
    assert not caplog.records
    small = train_tokenizer(TEXTS, "bpe", 5000)
    assert 270 < len(small) < 5000
    assert f"the texts yield a bpe vocabulary of only {len(small)} of the 5000 tokens asked for; " in caplog.text
    assert "tokenizer.kind=char" in caplog.text
    caplog.clear()
    assert len(train_tokenizer(TEXTS, "char", 5000)) == 4 + len(set("".join(TEXTS)))
    assert not caplog.records, "for characters and words the size is only a limit"
    assert len(train_tokenizer(TEXTS, "word", 7)) == 7
    assert "the" in train_tokenizer(TEXTS, "word", 5).get_vocab()


def test_extra_special_tokens(kind, tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind, KINDS[kind] + 2, extra_special_tokens=[">>it<<", ">>zh<<"])
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = same(">>zh<< the cat").input_ids
        assert ids[0] == 5
        assert same.convert_tokens_to_ids(">>it<<") == 4
        assert same.decode(ids, skip_special_tokens=True).strip() == "the cat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "wordpiece"}, "the kind of tokenizer is 'wordpiece'; it can be bpe, unigram, word, char"),
        ({"vocab_size": 259}, "vocab_size is 259, but a bpe tokenizer needs at least 260: 4 special tokens and"),
        ({"kind": "word", "vocab_size": 4}, "a word tokenizer needs at least 5: 4 special tokens and one entry"),
        ({"kind": "unigram", "vocab_size": 9}, "vocab_size 9 is too small for a unigram tokenizer"),
        ({"extra_special_tokens": ["<s>"]}, "special tokens must differ from each other and from <s>, <pad>, </s>"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, **arguments)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(kind, texts):
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        train_tokenizer(texts, kind)


@pytest.mark.parametrize("streaming", [False, True])
def test_of_pairs(streaming):
    pairs = read_pairs("embedded:tiny_en_it/validation", streaming=streaming)
    joint = build_tokenizer(pairs, vocab_size=500)
    assert isinstance(joint, PreTrainedTokenizerFast)
    assert source_and_target_tokenizer(joint) == (joint, joint)
    assert len(joint) == 500

    two = build_tokenizer(pairs, kind="char", joint=False, target_kind="word", target_vocab_size=91)
    assert isinstance(two, DragomanProcessor)
    source, target = source_and_target_tokenizer(two)
    assert {"a", "k"} < source.get_vocab().keys()
    assert {"di", "dispositivo"} < target.get_vocab().keys()
    assert len(target) == 91
    with pytest.raises(ValueError, match="a joint vocabulary has no target_kind or target_vocab_size"):
        build_tokenizer(pairs, target_vocab_size=91)


@pytest.mark.parametrize(("max_pairs", "expected"), [(1, "0"), (4, "0 3 6 9"), (5, "0 2 4 6 8"), (11, None)])
def test_a_tokenizer_of_some_of_the_pairs(max_pairs, expected):
    words = [str(number) for number in range(10)]
    pairs = Dataset.from_dict({"source": words, "target": words})
    tokenizer = build_tokenizer(pairs, kind="word", max_pairs=max_pairs)
    assert {*tokenizer.get_vocab()} == {*SPECIAL_TOKENS, *(words if expected is None else expected.split())}


@pytest.mark.parametrize(("max_pairs", "expected"), [(1, "00"), (5, "00 01 10 11 20"), (99, None)])
def test_a_tokenizer_of_some_of_a_stream(tmp_path, max_pairs, expected):
    """The first pairs of each of its files."""
    words = [[f"{file}{row}" for row in range(4)] for file in range(3)]
    for file, rows in enumerate(words):
        (tmp_path / f"{file}.tsv").write_text("".join(f"{word}\t{word}\n" for word in rows))
    pairs = read_pairs(tmp_path / "*.tsv", streaming=True)
    pairs = with_settings(pairs, "it", source_lang="en", target_lang="it", source_prefix=None)
    tokenizer = build_tokenizer(pairs, kind="word", max_pairs=max_pairs)
    expected = [word for rows in words for word in rows] if expected is None else expected.split()
    assert {*tokenizer.get_vocab()} == {*SPECIAL_TOKENS, "<en>", "<it>", *expected}
    with pytest.raises(ValueError, match="max_pairs is 0; it must be at least 1"):
        build_tokenizer(pairs, max_pairs=0)
