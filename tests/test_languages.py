"""Many languages and task prefixes, from the columns of the rows to the decoded text, in both families."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LogitsProcessorList, SuppressTokensLogitsProcessor
from typer.testing import CliRunner

import dragoman.cli
from conversion.stock import TOKENIZERS
from dragoman.data.collators import encode_pairs
from dragoman.data.languages import encode_texts, languages
from dragoman.data.reading import read_pairs, with_settings
from dragoman.data.tokenizers import build_tokenizer, load_tokenizer, source_and_target_tokenizer, train_tokenizer
from dragoman.evaluation import evaluate_model
from dragoman.inference.loading import load
from dragoman.inference.translate import compare_strategies, translate
from dragoman.models.pipeline_dragoman import ForcedFirstTokens
from dragoman.training.arguments import load_experiment
from dragoman.training.card import calls
from dragoman.training.run import train, usage
from training.experiments import SECTIONS, training_section


WORDS = {"en": ["one", "two", "three"], "it": ["uno", "due", "tre"], "de": ["eins", "zwei", "drei"]}
DIRECTIONS = [("en", "it"), ("en", "de"), ("it", "en")]
ROWS = [
    {
        "source": " ".join(WORDS[source_lang][number] for number in numbers),
        "target": " ".join(WORDS[target_lang][number] for number in numbers),
        "source_lang": source_lang,
        "target_lang": target_lang,
    }
    for numbers in ([0], [1], [2], [0, 2], [1, 0, 2], [2, 1])
    for source_lang, target_lang in DIRECTIONS
]
SOURCES, TARGETS, SOURCE_LANGS, TARGET_LANGS = (
    [row[name] for row in ROWS] for name in ("source", "target", "source_lang", "target_lang")
)

RNN = {"preset": "lstm_bahdanau", "embedding_dim": 16, "hidden_size": 24, "encoder_layers": 1, "decoder_layers": 1}
MODELS = {
    "transformer": {**SECTIONS["model"], "d_model": 24, "dropout": 0.0, "label_smoothing": 0.0},
    "recurrent": {**RNN, "dropout": 0.0, "label_smoothing": 0.0},
}


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder: Path, rows=ROWS, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    data = write(folder / "rows.jsonl", rows)
    sections = {
        "model": MODELS["transformer"],
        "tokenizer": SECTIONS["tokenizer"],
        "data": {"train": data, "validation": data, "test": data},
        "training": training_section(folder, 2, per_device_train_batch_size=9, per_device_eval_batch_size=7),
    }
    for section, keys in changes.items():
        sections[section] = {**sections[section], **keys} if section != "model" else keys
    path = folder / "languages.yaml"
    path.write_text(yaml.safe_dump(sections))
    return train(load_experiment(path))


@pytest.fixture(scope="module", params=["transformer", "recurrent", "two vocabularies"])
def trained(request, tmp_path_factory) -> Path:
    """A model that knows three directions by heart."""
    separate = request.param == "two vocabularies"
    model = {**MODELS["transformer"], "share_embeddings": False} if separate else MODELS[request.param]
    return run(
        tmp_path_factory.mktemp("languages"),
        model=model,
        tokenizer={"joint": not separate},
        training={"max_steps": 120, "eval_steps": 120, "save_steps": 120},
    )


def texts(outputs) -> list[str]:
    return [best.text for best, *_ in outputs]


def test_pipelines_decode_every_row_into_its_language(trained):
    translator = dragoman.pipeline("translation", trained)
    assert translator(ROWS, batch_size=5) == [{"translation_text": target} for target in TARGETS]
    into_german = {"source_lang": "en", "target_lang": "de", "num_beams": 2}
    expected = texts(translate(*load(trained), ["one two"], **into_german))
    assert [output["translation_text"] for output in translator("one two", **into_german)] == expected
    assert "".join(translator.stream("two", source_lang="en", target_lang="it")) == "due"
    with pytest.raises(ValueError, match="source_lang='fr': this model takes one of en, it"):
        translator("un", source_lang="fr", target_lang="it")
    with pytest.raises(ValueError, match="target_lang=None: this model takes one of de, en, it"):
        translator("one", source_lang="en")


def test_the_card_names_the_languages_and_how_to_choose(trained, capsys):
    text = (trained / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.language == ["en", "it", "de"]
    assert card.data.pipeline_tag == "translation"
    plain, with_pipeline = re.findall("```python\n(.*?)```", text, re.DOTALL)
    exec(plain, {})
    assert capsys.readouterr().out == "['uno']\n"  # from the first source language to the last target language
    exec(with_pipeline, {})
    assert "{'generated_text': 'uno'," in capsys.readouterr().out


def test_each_side_has_its_codes(trained):
    processing_class = load_tokenizer(trained)
    source, target = source_and_target_tokenizer(processing_class)
    assert languages(processing_class, "source") == ["en", "it"]
    assert languages(processing_class, "target") == ["de", "en", "it"]
    if source is target:
        assert source.convert_tokens_to_ids(["<de>", "<en>", "<it>"]) == [4, 5, 6]
    else:
        assert source.convert_tokens_to_ids(["<en>", "<it>"]) == [4, 5]
        assert target.convert_tokens_to_ids(["<de>", "<en>", "<it>"]) == [4, 5, 6]
        assert "<de>" not in source.get_vocab()


def test_validation_and_test_decode_every_row_into_its_language(trained):
    """Their batches hold rows of several languages; without the right first token no text could be right."""
    state = json.loads((trained / "trainer_state.json").read_text())
    assert [log["eval_chrf"] for log in state["log_history"] if "eval_chrf" in log] == [pytest.approx(100)]
    assert json.loads((trained / "test_results.json").read_text())["chrf"] == pytest.approx(100)
    assert "forced_bos_token_id" not in json.loads((trained / "generation_config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"penalty_alpha": 0.1, "top_k": 2},
        {"do_sample": True, "top_k": 1},
    ],
    ids=["greedy", "beam", "contrastive", "sampling"],
)
def test_rows_of_several_languages_in_one_batch(trained, settings):
    model, processing_class = load(trained, device="cpu")
    chosen = {"source_lang": SOURCE_LANGS, "target_lang": TARGET_LANGS}
    assert texts(translate(model, processing_class, SOURCES, **chosen, batch_size=5, **settings)) == TARGETS
    for source_lang, target_lang in DIRECTIONS:  # and one language at a time
        mine = [row for row in ROWS if (row["source_lang"], row["target_lang"]) == (source_lang, target_lang)]
        found = translate(
            model, processing_class, [row["source"] for row in mine],
            source_lang=source_lang, target_lang=target_lang, **settings,
        )  # fmt: skip
        assert texts(found) == [row["target"] for row in mine]


def test_processors_of_the_caller_stand_beside_the_languages(trained, monkeypatch):
    """Rows of one language or of two; the processor forbids the end, so every output has its full length."""
    model, processing_class = load(trained, device="cpu")
    argument = {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([2])]), "max_new_tokens": 6}
    translator = dragoman.pipeline("translation", trained)
    found, generate = [], translator.model.generate
    monkeypatch.setattr(
        translator.model, "generate", lambda **settings: found.append(generate(**settings)) or found[-1]
    )
    for codes, tokens in ((["de", "it"], ["<de>", "<it>"]), (["it", "it"], ["<it>", "<it>"])):
        outputs = translate(model, processing_class, ["one", "two"], source_lang="en", target_lang=codes, **argument)
        _, target = source_and_target_tokenizer(processing_class)
        assert [target.convert_ids_to_tokens(best.token_ids[0]) for best, *_ in outputs] == tokens
        assert [len(best.token_ids) for best, *_ in outputs] == [6, 6]
        rows = [{"source": "one", "source_lang": "en", "target_lang": code} for code in codes]
        translator(rows, batch_size=2, **argument)
        assert [target.convert_ids_to_tokens(ids[1].item()) for ids in found[-1]] == tokens
        assert found[-1].shape == (2, 7)


def test_the_first_tokens_do_what_one_forced_token_does(trained):
    model, processing_class = load(trained, device="cpu")
    ids = encode_texts(processing_class, "source", ["one two", "three"], ["en", "en"])
    batch = processing_class.pad({"input_ids": ids}, return_tensors="pt")
    for settings in ({"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}):
        settings |= {"return_dict_in_generate": True}
        one = model.generate(**batch, forced_bos_token_id=4, **settings)
        processor = LogitsProcessorList([ForcedFirstTokens([4, 4])])
        own = model.generate(**batch, logits_processor=processor, **settings)
        assert torch.equal(one.sequences, own.sequences)
        assert (own.sequences[:, 1] == 4).all()
    torch.testing.assert_close(one.sequences_scores, own.sequences_scores)
    mixed = model.generate(**batch, logits_processor=LogitsProcessorList([ForcedFirstTokens([6, 4])]), num_beams=3)
    assert mixed[:, 1].tolist() == [6, 4]


def test_the_lines_that_training_prints(trained, capsys):
    pair = ROWS[12]  # "two one three"
    exec("\n".join(line.strip() for line in usage(trained, pair).splitlines()), {})
    assert capsys.readouterr().out == pair["target"] + "\n"


def test_the_lines_for_pairs_without_languages(tmp_path):
    """As those that a model of one direction is fine-tuned on."""
    settings = {"source_languages": ["en"], "target_languages": ["it"], "source_prefix": "now: "}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    call = calls(tmp_path, {"source": "one"})
    assert (call.text, call.languages) == ('"<en>now: one"', ', source_lang="en", target_lang="it"')
    assert call.into == ', forced_bos_token_id=tokenizer.convert_tokens_to_ids("<it>")'


def test_the_same_in_plain_transformers(trained):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained).eval()
    processing_class = load_tokenizer(trained)
    _, target = source_and_target_tokenizer(processing_class)
    inputs = processing_class("<en>two one three", return_tensors="pt")
    for code, expected in (("<it>", "due uno tre"), ("<de>", "zwei eins drei")):
        ids = model.generate(**inputs, forced_bos_token_id=target.convert_tokens_to_ids(code), max_length=9)
        assert processing_class.decode(ids[0], skip_special_tokens=True) == expected


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_encoding_is_that_of_a_stock_call(kind, tmp_path):
    sentences = ["one two", "two <it> three </s>"]
    size = {"bpe": 300, "unigram": 24, "word": 40, "char": 40}[kind]
    made = train_tokenizer(["one two three"] * 9, kind, size, source_languages=["en"], target_languages=["de", "it"])
    made.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_texts(tokenizer, "source", sentences[:1]) == [tokenizer("<en>one two").input_ids]
    assert encode_texts(tokenizer, "target", sentences[:1], ["it"]) == [tokenizer("<it>one two").input_ids]
    (ids,) = encode_texts(tokenizer, "source", sentences[1:])
    assert not set(ids[1:-1]) & {0, 1, 2, *tokenizer.convert_tokens_to_ids(["<en>", "<it>", "<de>"])}, "text is text"
    assert tokenizer.decode(ids[:3], skip_special_tokens=True).strip() in "two"


def test_threads_do_not_change_each_others_language(tmp_path, monkeypatch):
    """A checkpoint's tokenizer is set to a language while it encodes; here, one thread dawdles over it."""
    _, _, make = TOKENIZERS["nllb"]
    tokenizer = make(tmp_path)
    codes = ["ita_Latn", "deu_Latn", "fra_Latn"]
    expected = [encode_texts(tokenizer, "source", ["a b"], [code]) for code in codes]
    assert len({row[0] for ((*row,),) in expected}) == len(codes)
    inner = type(tokenizer).__call__

    def slow(self, *arguments, **settings):
        time.sleep(0.05)
        return inner(self, *arguments, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", slow)
    with ThreadPoolExecutor(len(codes)) as pool:
        assert list(pool.map(lambda code: encode_texts(tokenizer, "source", ["a b"], [code]), codes)) == expected


def test_reserved_tokens_of_the_user_are_still_searched_for():
    tokenizer = train_tokenizer(["one two"], "word", 20, ["<sep>"], target_languages=["it"])
    (ids,) = encode_texts(tokenizer, "target", ["one <sep> two"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<it>", "one", "<sep>", "two", "</s>"]


def test_on_the_command_line(trained):
    command = ["generate", str(trained), "--source-lang", "en", "--target-lang", "de"]
    result = CliRunner().invoke(dragoman.cli.app, command, input="one three\n\nthree\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "eins drei\n\ndrei\n"
    for options, sentence in (
        (["--source-lang", "en"], "the model has several target languages: give target_lang, one of de, en, it"),
        (["--target-lang", "it"], "the model has several source languages: give source_lang, one of en, it"),
        (
            ["--source-lang", "en", "--target-lang", "fr"],
            "the tokenizer does not know the target language 'fr': Valid: de, en, it.",
        ),
        (
            ["--source-lang", "en", "--target-lang", "it", "--forced-bos-token-id", "5"],
            "target_lang='it' decides forced_bos_token_id: give one of the two.",
        ),
    ):
        result = CliRunner().invoke(dragoman.cli.app, [*command[:2], *options], input="one\n")
        assert (result.exit_code, result.stderr) == (2, f"dragoman generate: {sentence}\n")


def test_masks_on_the_command_line(trained, tmp_path):
    command = ["masks", str(trained), "one two", "--target", "eins zwei", "--out", str(tmp_path / "masks.png")]
    result = CliRunner().invoke(dragoman.cli.app, [*command, "--source-lang", "en", "--target-lang", "de"])
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(dragoman.cli.app, command)
    assert (result.exit_code, result.stderr) == (
        2,
        "dragoman masks: the model has several source languages: give source_lang, one of en, it\n",
    )


def test_evaluation_reads_the_columns(trained, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    report = evaluate_model(trained, data, tmp_path / "out", metrics=["exact_match"], batch_size=5)
    assert report["strategies"]["default"]["headline"] == {"exact_match": 1.0}
    bare = write(tmp_path / "bare.jsonl", [{name: row[name] for name in ("source", "target")} for row in ROWS[::3]])
    options = ["--source-lang", "en", "--target-lang", "it", "--metric", "exact_match", "--output", str(tmp_path / "b")]
    result = CliRunner().invoke(dragoman.cli.app, ["evaluate", str(trained), bare, *options])
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "b" / "scores.json").read_text())["strategies"]["default"]["headline"] == {
        "exact_match": 1.0
    }
    result = CliRunner().invoke(dragoman.cli.app, ["evaluate", str(trained), data, *options])
    assert "has a column 'source_lang', so a source_lang for all of it ('en') must be left out" in result.stderr
    with pytest.raises(ValueError, match="the model has several target languages: give target_lang"):
        evaluate_model(trained, bare, tmp_path / "c", source_lang="en")


def test_comparing_strategies(trained):
    outputs = compare_strategies(
        *load(trained, device="cpu"), SOURCES[:3], ["greedy", "beam"],
        source_lang=SOURCE_LANGS[:3], target_lang=TARGET_LANGS[:3],
    )  # fmt: skip
    assert {name: [best.text for best in found] for name, found in outputs.items()} == {
        "greedy": TARGETS[:3],
        "beam": TARGETS[:3],
    }


def test_as_many_languages_as_sentences(trained):
    model, processing_class = load(trained, device="cpu")
    with pytest.raises(ValueError, match="target_lang has 2 values for 1 sentences: give one for all, or one for each"):
        translate(model, processing_class, ["one"], source_lang="en", target_lang=["it", "de"])


# ---------------------------------------------------------------- one language for a whole set, and mistakes


def without_languages(rows=ROWS):
    return [{"source": row["source"], "target": row["target"]} for row in rows]


def test_constants_of_the_file_are_defaults_of_the_model(tmp_path):
    rows = without_languages(ROWS[::3])
    output = run(tmp_path, rows, data={"source_lang": "en", "target_lang": "it", **paths(tmp_path)})
    model, tokenizer = load(output, device="cpu")
    assert model.generation_config.forced_bos_token_id == tokenizer.convert_tokens_to_ids("<it>")
    (best,) = translate(model, tokenizer, ["one"])[0]
    assert best.token_ids[0] == tokenizer.convert_tokens_to_ids("<it>")
    assert encode_texts(tokenizer, "source", ["one"]) == [tokenizer("<en>one").input_ids]


def paths(folder: Path) -> dict[str, str]:
    return dict.fromkeys(("train", "validation", "test"), str(folder / "rows.jsonl"))


def test_a_constant_beside_a_column(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train has a column 'source_lang', so a source_lang for all of it"):
        run(tmp_path, data={**paths(tmp_path), "source_lang": "en"})
    stream = read_pairs(write(tmp_path / "rows.jsonl", [*without_languages()[:1], *ROWS]), streaming=True)
    with pytest.raises(ValueError, match=r"data\.train has a column 'target_lang', so a target_lang for all of it"):
        list(with_settings(stream, "data.train", source_lang=None, target_lang="it", source_prefix=None))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, r"rows\.jsonl:2: the value of 'target_lang' is of type NoneType, not a string"),
        (3, r"rows\.jsonl:2: the value of 'target_lang' is of type int, not a string"),
        (..., r"rows\.jsonl: pair 2 has no text as its 'target_lang', which other"),
    ],
)
def test_a_row_without_a_language(value, sentence, tmp_path):
    row = {**ROWS[1], "target_lang": value}
    if value is ...:
        del row["target_lang"]
    with pytest.raises(ValueError, match=sentence):
        read_pairs(write(tmp_path / "rows.jsonl", [ROWS[0], row, ROWS[2]]))


def test_columns_of_a_tsv_file(tmp_path):
    names = list(ROWS[0])
    lines = ["\t".join(names), *("\t".join(row.values()) for row in ROWS)]
    (tmp_path / "rows.tsv").write_text("".join(f"{line}\n" for line in lines))
    assert read_pairs(tmp_path / "rows.tsv").to_list() == ROWS


def test_a_column_that_the_model_has_no_use_for(tmp_path):
    tokenizer = build_tokenizer(read_pairs(write(tmp_path / "bare.jsonl", without_languages())), kind="word")
    rows = read_pairs(write(tmp_path / "rows.jsonl", ROWS))
    sentence = "pair 1: source_lang is 'en', but the model's tokenizer has no source languages: leave source_lang out"
    with pytest.raises(ValueError) as caught:
        encode_pairs(rows, tokenizer)
    assert str(caught.value) == sentence


def test_a_language_that_training_did_not_see(tmp_path):
    rows = read_pairs(write(tmp_path / "rows.jsonl", ROWS))
    tokenizer = build_tokenizer(rows, kind="word")
    other = read_pairs(write(tmp_path / "other.jsonl", [*ROWS[:2], {**ROWS[2], "target_lang": "ens"}]))
    with pytest.raises(ValueError, match="pair 3: the tokenizer does not know the target language 'ens': did you"):
        encode_pairs(other, tokenizer)
    with pytest.raises(ValueError, match="pair 1: the model has several source languages: give source_lang, one of"):
        encode_pairs(read_pairs(write(tmp_path / "bare.jsonl", without_languages())), tokenizer)


def test_a_stream_of_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    tokenizer = build_tokenizer(read_pairs(path, streaming=True), kind="word")
    whole, _ = encode_pairs(read_pairs(path), tokenizer)
    streamed, _ = encode_pairs(read_pairs(path, streaming=True), tokenizer)
    assert list(streamed) == list(whole)


# ---------------------------------------------------------------- task prefixes


def test_a_prefix_is_saved_with_the_model(tmp_path):
    prefix = "translate English to Italian: "
    output = run(tmp_path, without_languages(ROWS[::3]), data={**paths(tmp_path), "source_prefix": prefix})
    model, tokenizer = load(output, device="cpu")
    vocabulary = set(tokenizer.get_vocab())
    assert {"translate", "English", "Italian:"} <= vocabulary
    with_default = translate(model, tokenizer, ["one two", " "])
    without = translate(model, tokenizer, [f"{prefix}one two", ""], source_prefix="")
    assert with_default == without
    assert with_default[1][0].token_ids == []
    assert translate(model, tokenizer, ["one two"], source_prefix="") != with_default[:1]
    result = CliRunner().invoke(
        dragoman.cli.app, ["generate", str(output), "--scores", "--source-prefix", "English "], input="two\n"
    )
    (expected,) = translate(model, tokenizer, ["two"], source_prefix="English ")[0]
    assert result.stdout == f"{expected.score:.4f}\t{expected.text}\n"


def test_a_prefix_for_each_row(tmp_path):
    """Text to text: one model, two tasks, told apart by the prefix alone."""
    rows = [
        {"source_prefix": f"{task}: ", "source": row["source"], "target": row[name]}
        for row in ROWS[::3]
        for task, name in (("translate", "target"), ("copy", "source"))
    ]
    training = {"max_steps": 120, "eval_steps": 120, "save_steps": 120}
    output = run(tmp_path, rows, training=training)
    assert json.loads((output / "test_results.json").read_text())["chrf"] == pytest.approx(100)
    model, tokenizer = load(output, device="cpu")
    sentences, prefixes = ["one", "two", "one"], ["copy: ", "translate: ", "translate: "]
    assert texts(translate(model, tokenizer, sentences, source_prefix=prefixes)) == ["one", "due", "uno"]
    data = tmp_path / "rows.jsonl"
    report = evaluate_model(output, data, tmp_path / "out", metrics=["exact_match"])
    assert report["strategies"]["default"]["headline"] == {"exact_match": 1.0}


def test_both_directions(tmp_path):
    rows = without_languages(ROWS[::3])
    data = {**paths(tmp_path), "source_lang": "en", "target_lang": "it", "both_directions": True}
    output = run(tmp_path, rows, data=data, training={"max_steps": 120, "eval_steps": 120, "save_steps": 120})
    model, tokenizer = load(output, device="cpu")
    settings = {"source_lang": ["en", "it"], "target_lang": ["it", "en"]}
    assert texts(translate(model, tokenizer, ["two one three", "tre due"], **settings)) == ["due uno tre", "three two"]
    with pytest.raises(ValueError, match=r"data\.both_directions: data\.train has a source_prefix, and nobody knows"):
        run(tmp_path / "prefix", rows, data={**data, **paths(tmp_path / "prefix"), "source_prefix": "to Italian: "})
    with pytest.raises(ValueError, match=r"data\.both_directions: data\.train needs source_lang and target_lang"):
        run(tmp_path / "without", rows, data={**paths(tmp_path / "without"), "both_directions": True})
