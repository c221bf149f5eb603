"""What is pushed, and that it loads by name in a process without the package: the same outputs, old revisions too."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from typer.testing import CliRunner

import dragoman.cli
from conftest import WITHOUT_THE_PACKAGE
from dragoman.evaluation.run import evaluate_model
from dragoman.training import push as push_module
from dragoman.training.arguments import load_experiment
from dragoman.training.card import MARKER, write_card
from dragoman.training.push import push
from dragoman.training.run import train
from hub.server import USER, environment, metadata_errors, serve, used_here
from inference.tiny import SOURCES, TARGETS, learned_by_heart
from training.experiments import write_experiment


SENTENCES = SOURCES[:3]


def run_dragoman(*arguments):
    return CliRunner().invoke(dragoman.cli.app, [str(argument) for argument in arguments])


def perturb(model) -> None:
    """Another model, which says something else."""
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight.roll(1, dims=0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub to which everything was pushed that the tests look at, and what was known before."""
    folder = tmp_path_factory.mktemp("world")
    with serve() as hub, used_here(hub, folder / "cache"):
        world = SimpleNamespace(hub=hub, folder=folder, revisions={}, answers={}, results=[])

        model, tokenizer = learned_by_heart()
        for part in (model, tokenizer):
            part.save_pretrained(folder / "heart")
        for message in ("First", "Nothing new"):
            world.results.append(run_dragoman("push", folder / "heart", "heart", "--private", "--message", message))
        world.revisions["old"] = hub.commits(f"{USER}/heart")[-1].oid
        perturb(model)
        model.save_pretrained(folder / "heart")
        world.results.append(run_dragoman("push", folder / "heart", f"{USER}/heart"))
        inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        world.answers["new"] = tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        world.results.append(run_dragoman("push", folder / "heart", "heart", "--revision", "tried-once"))

        model, processor = learned_by_heart(two_vocabularies=True)
        model.push_to_hub(f"{USER}/two")
        processor.push_to_hub(f"{USER}/two")

        training = {"push_to_hub": True, "hub_model_id": f"{USER}/trained", "max_steps": 4}
        world.trained = train(load_experiment(write_experiment(folder, training=training)))
        out = world.trained / "evaluation"
        evaluate_model(world.trained, folder / "test.jsonl", out, strategies=["greedy"], metrics=["chrf"])
        world.results.append(run_dragoman("push", world.trained, f"{USER}/trained"))
        yield world


def test_the_command_says_where_the_model_is_now(world):
    for result in world.results:
        assert result.exit_code == 0, result.stderr
    url, oid = f"{world.hub.url}/{USER}/heart", world.revisions["old"]
    assert world.results[0].stdout == f"{world.folder}/heart is now {url} at revision {oid}\n"


def test_only_what_changed_travels(world):
    first, third = world.hub.commits(f"{USER}/heart")
    assert (first.message, third.changed) == ("First", ["model.safetensors"])
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        first.files
    )
    assert {"modeling_dragoman.py", "configuration_dragoman.py", "pipeline_dragoman.py"} <= set(first.files)
    assert world.hub.repositories[f"{USER}/heart"].private
    assert not world.hub.repositories[f"{USER}/trained"].private


def test_a_branch_of_its_own(world):
    assert world.hub.repositories[f"{USER}/heart"].branches.keys() == {"main", "tried-once"}
    on_branch = world.hub.repositories[f"{USER}/heart"].branches["tried-once"][-1]
    assert on_branch.files == world.hub.commits(f"{USER}/heart")[-1].files


def test_training_pushes_while_it_trains(world):
    commits = world.hub.commits(f"{USER}/trained")
    in_progress = [commit for commit in commits if commit.message.startswith("Training in progress")]
    assert in_progress
    assert {"modeling_dragoman.py", "model.safetensors", "tokenizer.json"} <= set(in_progress[0].files)
    assert {"experiment.yaml", "config.json"} <= set(in_progress[0].files)
    assert (world.trained / "samples.jsonl").is_file()
    assert all("samples.jsonl" not in commit.files for commit in commits), "sentences of the validation data"
    assert not (world.trained / "checkpoint-pushed").exists()
    last = commits[-1].files
    assert {"experiment.yaml", "test_results.json", "evaluation/scores.json"} <= set(last)
    assert [path for path in last if re.search(r"checkpoint|training_args|optimizer|complete|predictions", path)] == []
    assert last["model.safetensors"] == (world.trained / "model.safetensors").read_bytes()


def test_the_card_of_a_trained_model(world):
    text = world.hub.commits(f"{USER}/trained")[-1].files["README.md"].decode()
    assert metadata_errors(text) == []
    card = ModelCard(text)
    figures = json.loads((world.trained / "test_results.json").read_text())
    reported = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert reported["chrf (greedy search)"] == round(figures["chrf"], 2)
    assert reported["chrf (greedy)"] == pytest.approx(figures["chrf"], abs=0.01)  # of dragoman evaluate
    assert {result.dataset_name for result in card.data.eval_results} == {"test.jsonl"}
    assert card.data.metrics == ["bleu", "chrf"]
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(written) == yaml.safe_load((world.trained / "experiment.yaml").read_text())
    parameters = AutoModelForSeq2SeqLM.from_pretrained(world.trained).num_parameters()
    assert f"{parameters:,} parameters, trained from scratch" in text


READER = (
    WITHOUT_THE_PACKAGE
    + """
import json, re
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, pipeline

work = json.load(open(sys.argv[1]))
found = {}
for load in (
    lambda: AutoModelForSeq2SeqLM.from_pretrained("ada/heart", trust_remote_code=False),
    lambda: pipeline("seq2seq-generation", model="ada/heart", trust_remote_code=False),
):
    try:
        load()
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded foreign code without being allowed to")

def translate(name, auto, **options):
    model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    tokenizer = auto.from_pretrained(name, trust_remote_code=True, **options)
    inputs = tokenizer(work["sentences"], return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)

found["new"] = translate("ada/heart", AutoTokenizer)
found["old"] = translate("ada/heart", AutoTokenizer, revision=work["old"])
found["two"] = translate("ada/two", AutoProcessor)
generator = pipeline("seq2seq-generation", model="ada/heart", trust_remote_code=True, revision=work["old"])
found["pipeline"] = [output["generated_text"] for output in generator(work["sentences"], batch_size=2)]
found["stream"] = "".join(generator.stream(work["sentences"][0]))
generator = pipeline("seq2seq-generation", model="ada/two", trust_remote_code=True)
found["nbest"] = generator(work["sentences"], num_beams=2, num_return_sequences=2, scores=True)
generator.save_pretrained(sys.argv[1] + ".again")  # and it can be passed on
found["again"] = pipeline(model=sys.argv[1] + ".again", trust_remote_code=True)(work["sentences"])
for block in re.findall("```python\\n(.*?)```", open(hf_hub_download("ada/trained", "README.md")).read(), re.S):
    exec(block, {})
json.dump(found, open(sys.argv[1] + ".found", "w"))
"""
)


def test_it_loads_by_name_without_the_package(world, tmp_path):
    work, script = tmp_path / "work.json", tmp_path / "reader.py"
    work.write_text(json.dumps({"sentences": SENTENCES, **world.revisions}))
    script.write_text(READER)
    process = subprocess.run(
        [sys.executable, script, work], cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment(world.hub, tmp_path / "cache")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(process.stdout.splitlines()) == 2  # of the two snippets of the card
    found = json.loads((tmp_path / "work.json.found").read_text())
    assert found["old"] == found["two"] == found["pipeline"] == TARGETS[:3]
    assert found["new"] == world.answers["new"] != TARGETS[:3]
    assert found["stream"] == TARGETS[0]
    assert [best["generated_text"] for best, _ in found["nbest"]] == TARGETS[:3]
    assert all(best["score"] > second["score"] for best, second in found["nbest"])
    assert [output["generated_text"] for output in found["again"]] == TARGETS[:3]


def test_a_name_on_the_hub_is_a_model_here(world):
    result = CliRunner().invoke(dragoman.cli.app, ["generate", f"{USER}/heart"], input="\n".join(SENTENCES))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == world.answers["new"]


def test_a_revision_of_a_name_on_the_hub(world, tmp_path):
    """One option of every command that loads a model."""
    name, old = f"{USER}/heart", world.revisions["old"]
    result = CliRunner().invoke(dragoman.cli.app, ["generate", name, "--revision", old], input="\n".join(SENTENCES))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == TARGETS[:3] != world.answers["new"]
    assert run_dragoman("attention", name, SENTENCES[0], "--revision", old).stdout.startswith(TARGETS[0])
    (tmp_path / "pair.tsv").write_text(f"{SENTENCES[0]}\t{TARGETS[0]}\n")
    scores = [
        float(run_dragoman("score", name, tmp_path / "pair.tsv", "--no-header", *options).stdout.split("\t")[0])
        for options in (["--revision", old], [])
    ]
    assert scores[0] > scores[1]
    result = run_dragoman(
        "evaluate", name, tmp_path / "pair.tsv", "--revision", old, "--metric", "chrf", "--output", tmp_path
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "scores.json").read_text())
    assert (report["revision"], report["strategies"]["default"]["headline"]["chrf"]) == (old, 100.0)
    assert run_dragoman("masks", name, SENTENCES[0], "--revision", old, "--out", tmp_path / "m.png").exit_code == 0
    for model, revision, sentence in [
        (name, "v9", f"'{name}' has no revision 'v9' on the Hub.\n"),
        (
            world.folder / "heart",
            old,
            f"revision '{old}' is for a name on the Hub, but {world.folder}/heart is",
        ),
    ]:
        for command in (
            ["generate", model],
            ["serve", model, "--port", "0"],
            ["demo", model],
            ["export", model, tmp_path / "exported", "--format", "ctranslate2"],
        ):
            result = run_dragoman(*command, "--revision", revision)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert sentence in result.stderr


def test_the_stock_trainer_pushes(world, tmp_path):
    """A script that knows only Transformers."""
    model, tokenizer = learned_by_heart()
    pairs = zip(SOURCES, TARGETS, strict=True)
    rows = [{**tokenizer(source), "labels": tokenizer(target).input_ids} for source, target in pairs]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), push_to_hub=True, hub_model_id=f"{USER}/stock", max_steps=2, save_steps=1,
        learning_rate=1e-6, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    commits = world.hub.commits(f"{USER}/stock")
    assert commits[-1].message == "End of training"
    assert any(commit.message.startswith("Training in progress") for commit in commits)
    assert {"modeling_dragoman.py", "pipeline_dragoman.py"} <= set(commits[-1].files)
    pushed = AutoModelForSeq2SeqLM.from_pretrained(f"{USER}/stock")
    inputs = AutoTokenizer.from_pretrained(f"{USER}/stock")(SENTENCES, return_tensors="pt", padding=True)
    assert tokenizer.batch_decode(pushed.generate(**inputs), skip_special_tokens=True) == TARGETS[:3]


def test_a_card_edited_by_hand_stays(world, tmp_path):
    learned_by_heart()[0].save_pretrained(tmp_path)
    write_card(tmp_path, example="the dog")
    assert 'tokenizer(["the dog"]' in (tmp_path / "README.md").read_text()
    write_card(tmp_path, f"{USER}/x")  # the example is kept
    written = (tmp_path / "README.md").read_text()
    assert 'tokenizer(["the dog"]' in written
    (tmp_path / "README.md").write_text(written.replace(MARKER, "Mine."))
    push(tmp_path, "edited")
    assert "Mine." in world.hub.commits(f"{USER}/edited")[-1].files["README.md"].decode()


def test_a_readme_of_the_current_folder_is_no_parent(tmp_path, monkeypatch):
    learned_by_heart()[0].save_pretrained(tmp_path / "model")
    (tmp_path / "README.md").write_text("---\nbase_model: somebody/else\n---\n")
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path / "model")
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model is None


def test_languages_make_it_a_translation(tmp_path):
    learned_by_heart()[0].save_pretrained(tmp_path)
    experiment = {
        "model": {"from_pretrained": "org/parent"},
        "data": {"train": "a.jsonl", "test": ["a.en", "a.it"], "source_lang": "eng_Latn", "target_lang": "it_IT"},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    (tmp_path / "test_results.json").write_text('{"bleu:tokenize=zh": 31.4159, "wer": 0.123456}')
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert metadata_errors(card.content) == []
    assert (card.data.language, card.data.pipeline_tag, card.data.base_model) == (
        ["eng", "it"],
        "translation",
        "org/parent",
    )
    first, second = card.data.eval_results
    assert (first.metric_type, first.metric_value, first.dataset_name) == ("bleu", 31.42, "a.en and a.it")
    assert (second.metric_type, second.metric_value) == ("wer", 0.1235)
    assert "fine-tuned from `org/parent` with Dragoman on `a.jsonl`" in card.text


def test_mistakes_are_one_sentence(world, tmp_path, monkeypatch):
    heart = world.folder / "heart"
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "unfinished" / name).write_bytes((heart / name).read_bytes())
    (tmp_path / "unfinished" / "experiment.yaml").write_text("model: {}")
    for folder, name, sentence in [
        (tmp_path / "nowhere", "x", "nowhere does not exist: give the folder of a finished model"),
        (tmp_path / "empty", "x", "empty holds no model (config.json is missing)"),
        (tmp_path / "unfinished", "x", "unfinished is not finished (complete.json is missing): go on with --resume"),
        (heart, "other/x", f"{world.hub.url} refuses the push to 'other/x': You don't have the rights to"),
        (heart, "a b/c", "Repo id must use alphanumeric chars"),
    ]:
        result = run_dragoman("push", folder, name)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert sentence in result.stderr
    monkeypatch.setattr(push_module.constants, "ENDPOINT", "http://127.0.0.1:9")
    result = run_dragoman("push", heart, "x")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "http://127.0.0.1:9 cannot be reached: " in result.stderr
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    for arguments in (["push", heart, "x"], ["train", world.folder / "tiny.yaml", "--overwrite"]):
        result = run_dragoman(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert (
            "there is no token for the Hub: set HF_TOKEN to one that may write, or run `hf auth login`" in result.stderr
        )


def test_a_token_in_the_yaml_is_refused(tmp_path):
    path = write_experiment(tmp_path, training={"hub_token": "hf_secret"})
    with pytest.raises(ValueError, match="it would be saved and pushed with the experiment; set HF_TOKEN"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("# no header", "no front matter"),
        ("---\nlanguage: Italian\n---\n", "language 'Italian' is no ISO 639 code"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n", "model-index: task.type is missing"),
    ],
)
def test_the_servers_own_check_can_fail(text, error):
    assert error in metadata_errors(text)
