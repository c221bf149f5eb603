"""The tokenizers of converted checkpoints, and translating between many languages and with task prefixes."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import dragoman.cli
from conversion.stock import TOKENIZERS, save_with_tokenizer
from dragoman.conversion import convert
from dragoman.data.collators import Seq2SeqCollator, encode_pairs
from dragoman.data.languages import encode_texts
from dragoman.inference.languages import language_argument, language_id
from dragoman.inference.loading import load
from dragoman.inference.translate import translate


SENTENCES = ["the cat sleeps", "sea: a red house near", "why not"]  # the second as T5 is told its task


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_kept(name, tmp_path):
    before = save_with_tokenizer(name, tmp_path / "stock")
    made = convert(tmp_path / "stock", tmp_path / "converted")
    assert made.has_tokenizer
    after = AutoTokenizer.from_pretrained(made.folder)
    assert type(after) is type(before)
    for settings in ({"text": SENTENCES}, {"text_target": SENTENCES}, {"text": SENTENCES, "text_target": SENTENCES}):
        assert after(**settings, padding=True) == before(**settings, padding=True)
    ids = after(text_target=SENTENCES[0]).input_ids
    assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert after.pad_token_id == before.pad_token_id


def test_a_tokenizer_that_only_its_model_type_names(tmp_path):
    """Old checkpoints leave the class of the tokenizer to the type of the model, which a conversion changes."""
    before = save_with_tokenizer("marian", tmp_path / "stock")
    path = tmp_path / "stock" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    folder = convert(tmp_path / "stock", tmp_path / "converted").folder
    assert AutoTokenizer.from_pretrained(folder)(SENTENCES) == before(SENTENCES)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_translated_as_before(name, tmp_path):
    tokenizer = save_with_tokenizer(name, tmp_path / "stock")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    model, converted_tokenizer = load(convert(tmp_path / "stock", tmp_path / "converted").folder, device="cpu")
    settings = {"num_beams": 4, "num_return_sequences": 3}
    found = [one for best in translate(model, converted_tokenizer, SENTENCES, scores=False, **settings) for one in best]
    expected = stock.generate(**tokenizer(SENTENCES, return_tensors="pt", padding=True), **settings)
    assert [one.text for one in found] == tokenizer.batch_decode(expected, skip_special_tokens=True)
    for one, row in zip(found, expected.tolist(), strict=True):
        assert one.token_ids == row[1 : 1 + len(one.token_ids)]
    assert len({tuple(one.token_ids) for one in found}) > 2


LANGUAGES = [
    ("m2m100", "it", "de", "forced_bos_token_id"),
    ("nllb", "ita_Latn", "deu_Latn", "forced_bos_token_id"),
    ("mbart50", "it_IT", "de_DE", "forced_bos_token_id"),
    ("mbart", "it_IT", "de_DE", "decoder_start_token_id"),
]


@pytest.mark.parametrize(("name", "source", "target", "argument"), LANGUAGES)
def test_languages_are_chosen_by_their_codes(name, source, target, argument, tmp_path):
    save_with_tokenizer(name, tmp_path / "stock")
    folder = convert(tmp_path / "stock", tmp_path / "converted").folder
    model, tokenizer = load(folder, device="cpu")
    before = (tokenizer.src_lang, tokenizer.tgt_lang)
    code = tokenizer.get_lang_id(target) if name == "m2m100" else tokenizer.convert_tokens_to_ids(target)
    assert language_argument(tokenizer) == argument
    assert language_id(tokenizer, target) == code
    found = translate(model, tokenizer, SENTENCES, source_lang=source, target_lang=target, max_length=7, scores=False)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == before
    tokenizer.src_lang = source
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    assert tokenizer.convert_tokens_to_ids(f"__{source}__" if name == "m2m100" else source) in batch.input_ids[0]
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    expected = stock.generate(**batch, **{argument: code}, max_length=7)
    assert (expected[:, 0 if name == "mbart" else 1] == code).all()
    for hypotheses, row in zip(found, expected.tolist(), strict=True):
        assert hypotheses[0].token_ids == row[1 : 1 + len(hypotheses[0].token_ids)]

    command = ["generate", str(folder), "--source-lang", source, "--target-lang", target, "--max-length", "7"]
    result = CliRunner().invoke(dragoman.cli.app, command, input="\n".join(SENTENCES))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [hypotheses[0].text for hypotheses in found]
    result = CliRunner().invoke(dragoman.cli.app, [*command[:3], "klingon"])
    assert result.exit_code == 2
    assert "dragoman generate: the tokenizer does not know the source language 'klingon': " in result.stderr


@pytest.mark.parametrize(("name", "source", "target", "argument"), LANGUAGES)
def test_each_row_may_have_its_own(name, source, target, argument, tmp_path):
    """Two directions in one batch against the stock class, one direction at a time."""
    save_with_tokenizer(name, tmp_path / "stock")
    model, tokenizer = load(convert(tmp_path / "stock", tmp_path / "converted").folder, device="cpu")
    sources, targets = [source, target, target], [target, source, target]
    settings = {"num_beams": 3, "max_length": 7, "scores": False}
    found = translate(model, tokenizer, SENTENCES, source_lang=sources, target_lang=targets, **settings)
    triples = zip(SENTENCES, sources, targets, strict=True)
    rows = [dict(zip(("source", "source_lang", "target_lang"), triple, strict=True)) for triple in triples]
    translator = dragoman.pipeline("translation", model, tokenizer=tokenizer, num_beams=3, max_length=7)
    outputs = translator(rows, batch_size=3)
    assert [output["translation_text"] for output in outputs] == [best.text for (best,) in found]
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    for sentence, source_lang, target_lang, (best,) in zip(SENTENCES, sources, targets, found, strict=True):
        tokenizer.src_lang = source_lang
        batch = tokenizer([sentence], return_tensors="pt")
        first = {argument: language_id(tokenizer, target_lang)}
        (row,) = stock.generate(**batch, **first, num_beams=3, max_length=7).tolist()
        assert best.token_ids == row[1 : 1 + len(best.token_ids)]
        assert [best.start_id, *best.token_ids][argument == "forced_bos_token_id"] == first[argument]


def test_labels_of_many_languages(tmp_path):
    """Every row's codes where the tokenizer puts them, and the tokenizer as it was afterwards."""
    rows = [
        {"source": text, "target": text, "source_lang": source, "target_lang": target}
        for text, (source, target) in zip(SENTENCES, [("en", "it"), ("it", "de"), ("en", "de")], strict=True)
    ]
    (tmp_path / "files").mkdir()
    tokenizer = TOKENIZERS["m2m100"][2](tmp_path / "files")
    encoded, _ = encode_pairs(Dataset.from_list(rows), tokenizer)
    for row, ids in zip(rows, encoded, strict=True):
        tokenizer.src_lang, tokenizer.tgt_lang = row["source_lang"], row["target_lang"]
        both = tokenizer(row["source"], text_target=row["target"])
        assert (ids["input_ids"], ids["labels"]) == (both.input_ids, both.labels)
        assert ids["labels"][0] == tokenizer.get_lang_id(row["target_lang"])
    with pytest.raises(ValueError, match="pair 2: the tokenizer does not know the target language 'xx': "):
        encode_pairs(Dataset.from_list([rows[0], {**rows[1], "target_lang": "xx"}]), tokenizer)


def test_one_language_may_be_chosen_alone(tmp_path):
    tokenizer = TOKENIZERS["mbart50"][2](None)
    (ids,) = encode_texts(tokenizer, "source", ["a"], ["it_IT"])
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "it_IT"
    with pytest.raises(
        ValueError, match="target_lang is 'it', but the model's tokenizer has no target languages: leave"
    ):
        encode_texts(TOKENIZERS["t5"][2](None), "target", ["a"], ["it"])


@pytest.mark.parametrize("name", ["mbart", "mbart50", "nllb", "marian with two vocabularies"])
def test_labels_begin_as_in_the_stock_class(name, tmp_path):
    """Text pairs -> collated batch -> loss: the code that begins the target comes from the labels in mBART."""
    tokenizer = save_with_tokenizer(name, tmp_path / "stock")
    model, converted_tokenizer = load(convert(tmp_path / "stock", tmp_path / "converted").folder, device="cpu")
    pairs = Dataset.from_list([{"source": text, "target": text[::-1]} for text in SENTENCES])
    encoded, _ = encode_pairs(pairs, converted_tokenizer)
    batch = Seq2SeqCollator(converted_tokenizer, model=model)(list(encoded))
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    batch.pop("length", None)
    ours = model(**batch)
    decoder_input_ids = batch.pop("decoder_input_ids")
    theirs = stock(**batch)
    torch.testing.assert_close(ours.loss, theirs.loss)
    first = tokenizer.convert_tokens_to_ids("it_IT" if name == "mbart" else "</s>")
    if "marian" in name:
        first = model.config.decoder_start_token_id
    assert set(decoder_input_ids[:, 0].tolist()) == {first}


def test_truncation_keeps_the_end_of_the_sequence_and_the_code_behind_it(tmp_path):
    (tmp_path / "files").mkdir()
    tokenizer = TOKENIZERS["mbart"][2](tmp_path / "files")
    pairs = Dataset.from_list([{"source": "the cat sleeps", "target": "why not"}])
    limits = {"max_source_length": 5, "max_target_length": 4, "overlong": "truncate"}
    row = encode_pairs(pairs, tokenizer, **limits)[0][0]
    whole = tokenizer("the cat sleeps", text_target="why not")
    assert row["input_ids"] == whole.input_ids[:3] + whole.input_ids[-2:]
    assert row["labels"] == whole.labels[:2] + whole.labels[-2:]
