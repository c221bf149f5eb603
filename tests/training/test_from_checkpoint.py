"""Training that starts from a model: converted from a stock class, or trained here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from conversion.stock import LETTERS, save_with_tokenizer
from dragoman.conversion import convert
from dragoman.data.tokenizers import load_tokenizer
from dragoman.evaluation.scores import compute_scores
from dragoman.inference.loading import load
from dragoman.inference.translate import translate
from dragoman.training import run
from dragoman.training.arguments import load_experiment
from dragoman.training.run import train
from training.experiments import SECTIONS, training_section, write_experiment


# Pairs of the letters that the tokenizers know: every word becomes its successor.
WORDS = ["the", "cat", "sleeps", "red", "house", "sea"]
ROWS = [{"source": word, "target": WORDS[(number + 1) % len(WORDS)]} for number, word in enumerate(WORDS)]
assert set("".join(WORDS)) <= set(LETTERS)


def write(folder: Path, start: Path, rows=ROWS, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"from_pretrained": str(start), "dropout": 0.0, "label_smoothing": 0.1},
        "data": dict.fromkeys(("train", "validation", "test"), str(data)),
        "training": training_section(
            folder, 20, logging_steps=1, per_device_train_batch_size=6, per_device_eval_batch_size=4
        ),
    }
    for section, keys in changes.items():
        sections[section] = {**sections.get(section, {}), **keys}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def converted(name: str, folder: Path, **changes) -> Path:
    save_with_tokenizer(name, folder / "stock", **changes)
    return convert(folder / "stock", folder / "converted").folder


LANGUAGES = {
    "m2m100": ("en", "it", "de"),
    "nllb": ("eng_Latn", "ita_Latn", "deu_Latn"),
    "mbart": ("en_XX", "it_IT", "de_DE"),
}


@pytest.mark.parametrize("name", ["marian", "t5", *LANGUAGES])
def test_a_converted_checkpoint_is_trained_on(name, tmp_path):
    start = converted(name, tmp_path)
    rows = ROWS
    if name in LANGUAGES:
        source, *targets = LANGUAGES[name]
        rows = [{**row, "source_lang": source, "target_lang": target} for row in ROWS for target in targets]
    output = train(load_experiment(write(tmp_path, start, rows)))
    seen = losses(output)
    assert sum(seen[-3:]) < 0.9 * sum(seen[:3])
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (start, output))
    assert type(after) is type(before)
    assert after("the cat").input_ids == before("the cat").input_ids
    model, tokenizer = load(output, device="cpu")
    assert (model.config.dropout, model.config.label_smoothing) == (0.0, 0.1)
    assert model.dtype == torch.float32
    chosen = {}
    if name in LANGUAGES:
        chosen = {"source_lang": source, "target_lang": targets * 3}
    found = translate(model, tokenizer, WORDS, **chosen)
    assert len(found) == 6
    if name in LANGUAGES and name != "mbart":
        codes = {best.token_ids[0] for best, *_ in found}
        assert len(codes) == 2, "each row in its own language"
    marker = json.loads((output / "config.json").read_text())
    assert marker["model_type"] == "dragoman"


@pytest.mark.parametrize("name", ["m2m100", "mbart"])
def test_the_only_direction_becomes_the_default(name, tmp_path):
    start = converted(name, tmp_path)
    source, _, target = LANGUAGES[name]
    data = {"source_lang": source, "target_lang": target}
    output = train(load_experiment(write(tmp_path, start, data=data), ["training.max_steps=2"]))
    model, tokenizer = load(output, device="cpu")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (source, target)
    explicit = translate(model, tokenizer, WORDS, source_lang=source, target_lang=target)
    assert translate(model, tokenizer, WORDS) == explicit
    code = tokenizer.get_lang_id(target) if name == "m2m100" else tokenizer.convert_tokens_to_ids(target)
    settings = model.generation_config
    assert code == (settings.forced_bos_token_id if name == "m2m100" else settings.decoder_start_token_id)


def test_half_precision_is_trained_in_full(tmp_path):
    save_with_tokenizer("t5", tmp_path / "stock")
    start = convert(tmp_path / "stock", tmp_path / "half", dtype="bfloat16").folder
    output = train(load_experiment(write(tmp_path, start), ["training.max_steps=2"]))
    assert AutoModelForSeq2SeqLM.from_pretrained(output).dtype == torch.float32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(load_experiment(write_experiment(folder), ["training.max_steps=2"]))


def test_a_model_trained_here_is_trained_on(trained, tmp_path):
    path = write_experiment(tmp_path)
    overrides = [f"model.from_pretrained={trained}", "model.dropout=0.3", "training.learning_rate=0"]
    output = train(load_experiment(path, [*overrides, "training.max_steps=2"]))
    assert (output / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (trained, output))
    assert after.config.dropout == 0.3
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert after.generation_config.max_length == before.generation_config.max_length
    again = load_experiment(output / "experiment.yaml")
    assert again.model == {"model_type": "dragoman", "from_pretrained": str(trained), "dropout": 0.3}
    train(load_experiment(path, [*overrides, "training.max_steps=3"]), resume=True)


def test_longer_targets_raise_the_length(trained, tmp_path):
    rows = [{"source": "uno due", "target": " ".join(["uno"] * 21)}]
    output = train(load_experiment(write(tmp_path, trained, rows), ["training.max_steps=1"]))
    assert AutoModelForSeq2SeqLM.from_pretrained(output).generation_config.max_length == 34  # ceil(1.5 * 22) + 1
    output = train(
        load_experiment(write(tmp_path / "own", trained), ["training.max_steps=1", "generation.max_length=9"])
    )
    assert AutoModelForSeq2SeqLM.from_pretrained(output).generation_config.max_length == 9


def test_a_new_direction_between_known_languages(tmp_path):
    """With one vocabulary the tokens of both languages are there, so Italian can become a target too."""
    rows = [{"source": "uno", "target": "one", "source_lang": "it", "target_lang": "en"}]
    turned = [{"source": "one", "target": "uno", "source_lang": "en", "target_lang": "it"}]
    tiny = {"model": SECTIONS["model"], "tokenizer": SECTIONS["tokenizer"]}
    path = write(tmp_path, tmp_path, rows, **tiny)
    sections = yaml.safe_load(path.read_text())
    del sections["model"]["from_pretrained"]
    path.write_text(yaml.safe_dump(sections))
    start = train(load_experiment(path, ["training.max_steps=1"]))
    output = train(load_experiment(write(tmp_path / "more", start, rows + turned), ["training.max_steps=1"]))
    tokenizer = load_tokenizer(output)
    assert tokenizer.init_kwargs["target_languages"] == ["en", "it"]
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert model.generation_config.forced_bos_token_id is None, "the only target of the first training"
    new = [{**rows[0], "target_lang": "fr"}]
    with pytest.raises(ValueError, match="the tokenizer does not know the target language 'fr': Valid: en"):
        train(load_experiment(write(tmp_path / "new", start, new)))


def test_mistakes_are_one_sentence(trained, tmp_path):
    save_with_tokenizer("t5", tmp_path / "stock")
    stock = tmp_path / "stock"
    for start, changes, error, sentence in (
        (
            tmp_path / "nowhere",
            {},
            FileNotFoundError,
            r"model\.from_pretrained: .*nowhere does not exist: give",
        ),
        (tmp_path, {}, FileNotFoundError, r"model\.from_pretrained: .* holds no model \(config\.json is missing\)"),
        (
            stock,
            {},
            ValueError,
            rf"holds a model of type 't5'; convert it first, with 'dragoman convert {stock}",
        ),
        (
            trained,
            {"model": {"d_model": 16}},
            ValueError,
            r"model\.d_model is the checkpoint's own beside model",
        ),
        (trained, {"model": {"preset": "t5"}}, ValueError, r"model\.preset is the checkpoint's own beside"),
        (
            trained,
            {"model": {"dropout": "much"}},
            ValueError,
            r"model\.dropout must be a number or",
        ),
        (trained, {"model": {"dropout": 3.0}}, ValueError, "dropout"),
        (
            trained,
            {"tokenizer": {"kind": "char"}},
            ValueError,
            r"tokenizer\.kind must be left out: a model",
        ),
    ):
        with pytest.raises(error, match=sentence):
            load_experiment(write(tmp_path, start, **changes))


def test_the_test_is_decoded_as_the_checkpoint_decodes(trained, tmp_path, monkeypatch):
    """And not as the validations are."""
    start = shutil.copytree(trained, tmp_path / "start")
    GenerationConfig.from_pretrained(start, num_beams=3).save_pretrained(start)
    tested = []

    def compute(texts, *args):
        tested.append(texts)
        return compute_scores(texts, *args)

    monkeypatch.setattr(run, "compute_scores", compute)
    overrides = [f"model.from_pretrained={start}", "training.learning_rate=0", "training.max_steps=2"]
    output = train(load_experiment(write_experiment(tmp_path), [*overrides, "training.generation_max_length=3"]))
    sources = [json.loads(line)["source"] for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    loaded = load(output, device="cpu")
    by_default, greedy = (
        [best.text for best, *_ in translate(*loaded, sources, **how)] for how in ({}, {"num_beams": 1})
    )
    assert by_default != greedy
    assert tested == [by_default]
