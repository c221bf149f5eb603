import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import dragoman.cli
import dragoman_command as dragoman_command_module
from dragoman.data.reading import read_pairs
from dragoman.evaluation.compare import compare_predictions
from dragoman.evaluation.run import evaluate_model
from dragoman.inference.arguments import parse_generation_options
from dragoman.inference.loading import load
from dragoman.inference.scoring import score
from dragoman.inference.translate import translate
from dragoman.models import attention
from training.experiments import write_experiment


def dragoman_command(*arguments: str | Path, text: str = ""):
    return CliRunner().invoke(dragoman.cli.app, [str(argument) for argument in arguments], input=text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_experiment(tmp_path_factory.mktemp("model"))
    result = dragoman_command("train", path, "training.max_steps=2")
    assert result.exit_code == 0, result.output
    return path.parent / "run"


def test_train_says_what_it_has_and_what_came_of_it(tmp_path):
    path = write_experiment(tmp_path)
    result = dragoman_command("train", path, "training.max_steps=2")
    assert result.exit_code == 0
    assert "train: kept 23 of 23 pairs" in result.stdout
    assert "vocabulary: 11 joint" in result.stdout
    assert re.search(r"memory: about \d+ MB at most: weights \d+ MB, ", result.stdout)
    assert re.search(r"model: DragomanForConditionalGeneration, [\d,]+ parameters, on cpu", result.stdout)
    assert re.search(r"test chrf: \d+\.\d\d \(greedy search\)", result.stdout)
    assert f"AutoModelForSeq2SeqLM.from_pretrained('{tmp_path}/run')" in result.stdout


def test_no_bars_in_a_file(tmp_path):
    result = dragoman_command(
        "train", write_experiment(tmp_path), "training.disable_tqdm=false", "training.max_steps=3"
    )
    assert result.stderr == ""
    assert re.search(r"^epoch 0\.50 of 1, step 3 of 3: loss \d", result.stdout, re.MULTILINE)
    assert "{'loss'" not in result.stdout


def test_the_attention_of_training_steps(tmp_path, monkeypatch):
    """That of evaluations and of the saved model stays what it is."""
    path, training = write_experiment(tmp_path), set()

    def record(module, *args, **kwargs):
        training.add(module.training)
        return eager_attention(module, *args, **kwargs)

    eager_attention = attention.eager_attention
    monkeypatch.setattr(attention, "eager_attention", record)
    result = dragoman_command("train", path, "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert not training
    result = dragoman_command(
        "train", path, "training.max_steps=2", "--overwrite", "training.attn_implementation=eager"
    )
    assert result.exit_code == 0, result.output
    assert training == {True}
    run = path.parent / "run"
    assert "attn_implementation: eager" in (run / "experiment.yaml").read_text()
    assert "attn" not in (run / "config.json").read_text()
    assert load(run)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["training.attn_implementation=flash"],
     "override: training.attn_implementation must be 'eager' or 'sdpa' or 'flex_attention' or 'varlen' or null, "
     "got 'flash'"),
    (["training.attn_implementation=sdpa", "model.preset=lstm_luong"],
     "override: training.attn_implementation is for models of type 'dragoman', not 'dragoman_rnn'; leave it out"),
    (["training.attn_implementation=flex_attention"],
     "training.attn_implementation 'flex_attention' has no gradients on cpu: use 'sdpa' or 'eager'"),
    (["training.attn_implementation=varlen", "training.bf16=true"],
     "training.attn_implementation 'varlen' needs a GPU and bfloat16 or float16, not bfloat16 on cpu: use 'sdpa'."),
    (["training.attn_implementation=varlen", "model.attention_dropout=0.1"],
     "training.attn_implementation 'varlen' cannot do attention_dropout=0.1: use 'sdpa' or 'eager'."),
])  # fmt: skip
def test_attention_that_cannot_be(tmp_path, overrides, sentence):
    result = dragoman_command("train", write_experiment(tmp_path), *overrides)
    assert result.exit_code == 2
    assert result.stderr == f"dragoman train: {sentence}\n"
    assert not (tmp_path / "run").exists()


def test_train_twice_needs_a_decision(tmp_path, model):
    path = model.parent / "tiny.yaml"
    result = dragoman_command("train", path, "training.max_steps=2")
    assert result.exit_code == 2
    assert result.stderr == (
        f"dragoman train: {model} is not empty: --resume goes on with its run, --overwrite deletes it\n"
    )
    assert dragoman_command("train", path, "training.max_steps=2", "--resume").exit_code == 0
    assert dragoman_command("train", path, "--resume", "--overwrite").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nowhere.yaml"], "dragoman train: nowhere.yaml does not exist in "),
        (["train", "configs/quikstart.yaml"], "; did you mean configs/quickstart.yaml?\n"),
        (["train", "config/quickstart.yml"], "there is no folder config; did you mean configs/quickstart.yaml?\n"),
        (["train", "configs"], "dragoman train: configs is a folder: give the YAML file of an experiment\n"),
        (
            ["train", "x.yaml", "--resum"],
            "dragoman train: no such option: --resum; the nearest valid one is --resume\n",
        ),
        (["train"], "dragoman train: missing argument 'config'; "),
        (["evaluate", "x", "y", "--batch-size", "0"], "dragoman evaluate: invalid value for '--batch-size': "),
        (["trian"], "dragoman: no such command: trian; the nearest valid one is train\n"),
        (["translate"], "dragoman: no such command: translate; the nearest valid one is generate\n"),
        (["--versoin"], "dragoman: no such option: --versoin; the nearest valid one is --version\n"),
        (["score", "x", "nowhere.jsonl"], "dragoman score: nowhere.jsonl does not exist in "),
        (["compare", "x.txt", "nowhere.txt"], "dragoman compare: x.txt does not exist in "),
        (["generate", "nowhere/at/all"], "dragoman generate: nowhere/at/all does not exist: "),
        (["generate", "x", "--num-beems", "2"], "no such option: --num-beems; the nearest valid one is --num-beams\n"),
        (["generate", "x", "--nbset", "2"], "no such option: --nbset; the nearest valid one is --nbest\n"),
        (["generate", "x", "--num-beams", "many"], "--num-beams must be a whole number or null, got 'many'\n"),
        (["generate", "x", "--compare", "--scores"], "--compare shows one output per strategy; leave out"),
        (["evaluate", "x", "nowhere.jsonl"], "dragoman evaluate: nowhere.jsonl does not exist"),
        (
            ["evaluate", "x", "y", "--strategi", "beam"],
            "no such option: --strategi; the nearest valid one is --strategy\n",
        ),
        (
            ["average", "only"],
            "dragoman average: only is to be written, but from what? Give checkpoints, or ",
        ),
        (["demo", "x", "--port", "99999"], "dragoman demo: invalid value for '--port': "),
        (["evaluate", "x", "y", "--strategy", "bean"], "there is no decoding strategy 'bean': did you mean 'beam'?"),
        (["evaluate", "x", "y", "--metric", "blue"], "there is no metric 'blue': did you mean 'bleu'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, sentence):
    result = dragoman_command(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_generate_keeps_the_order_and_empty_lines(model):
    lines = ["tre due uno", "", "uno", "sette sei cinque quattro"]
    result = dragoman_command("generate", model, "--batch-size", "2", text="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.stderr
    outputs = translate(*load(model), lines)
    assert result.stdout.split("\n") == [hypotheses[0].text for hypotheses in outputs] + [""]
    assert result.stdout.split("\n")[1] == ""


def test_generate_with_options(model):
    result = dragoman_command(
        "generate", model, "--nbest", "2", "--scores", "--num-beams", "3", "--max-new-tokens=4", text="uno\ndue\n"
    )
    assert result.exit_code == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["1", "1", "2", "2"]
    expected = translate(*load(model), ["uno", "due"], num_return_sequences=2, num_beams=3, max_new_tokens=4)
    assert [row[2] for row in rows] == [hypothesis.text for both in expected for hypothesis in both]
    for row, hypothesis in zip(rows, [hypothesis for both in expected for hypothesis in both], strict=True):
        assert float(row[1]) == pytest.approx(hypothesis.score, abs=1e-4)


def test_generate_forced_words(model):
    words = [word for word in load(model)[1].get_vocab() if word.isalpha()]
    command = ["generate", model, "--num-beams", "5", "--max-new-tokens", "6", "--force-word", words[0]]
    result = dragoman_command(*command, "--force-word", f"{words[1]}|{words[2]}", text="uno\n\ndue tre\n")
    assert result.exit_code == 0, result.stderr
    first, empty, last = result.stdout.splitlines()
    assert empty == ""
    for line in (first, last):
        assert words[0] in line.split()
        assert {words[1], words[2]} & set(line.split())


def test_a_pipe_is_answered_while_it_is_written(model):
    """Memory holds a window of lines, whatever their number: an endless pipe has its first answers at once."""
    command = [sys.executable, "-m", "dragoman", "generate", str(model), "--window", "5", "--max-new-tokens", "3"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=buffered) as process:
        process.stdin.write("uno\n" * 20)
        process.stdin.flush()
        answers = [process.stdout.readline() for _ in range(15)]  # the pipe stays open
        process.stdin.write("\n")
        process.stdin.close()
        answers += process.stdout.readlines()
    assert process.returncode == 0
    assert answers == [answers[0]] * 20 + ["\n"]
    assert answers[0] != "\n"


def test_sampling_repeats_with_a_seed(model):
    command = ["generate", model, "--do-sample", "--top-k", "0"]
    first, second, third = (
        dragoman_command(*command, "--seed", seed, text="uno due\n" * 5).stdout for seed in ("3", "3", "4")
    )
    assert first == second
    assert first != third


def test_compare_shows_every_strategy(model):
    result = dragoman_command("generate", model, "--compare", text="uno due\ntre\n")
    assert result.exit_code == 0, result.stderr
    for strategy in ("greedy", "beam", "sampling", "contrastive"):
        assert len(re.findall(rf"│ {strategy} ", result.stdout)) == 2
    assert "uno due" in result.stdout


def test_evaluate_writes_predictions_and_scores(model, tmp_path):
    data = model.parent / "test.jsonl"
    result = dragoman_command(
        "evaluate", model, data, "--strategy", "greedy", "--strategy", "beam:num_beams=2",
        "--metric", "chrf", "--output", tmp_path, "--max-new-tokens", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert f"Predictions and scores.json are in {tmp_path}" in result.stdout
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["strategies"]) == ["greedy", "beam:num_beams=2"]
    assert report["strategies"]["greedy"]["arguments"]["max_new_tokens"] == 3
    assert len((tmp_path / "predictions.greedy.txt").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--top-p", "0.9"], "`top_p`: `do_sample` is not set to `True`"),
        (["--temperature", "0.7"], "You should set `do_sample=True` or unset `temperature`.\n"),
        (["--top-p", "3", "--do-sample"], "--top-p must be greater than 0 and at most 1, got 3"),
        (
            ["--nbest", "3"],
            "num_return_sequences=3 (--nbest) needs num_beams (--num-beams) of at least 3, or do_sample",
        ),
        (["--forced-bos-token-id", "99999"], "forced_bos_token_id has the token id 99999, but the target vocabulary"),
        (["--suppress-tokens", "[99999]"], "suppress_tokens has the token id 99999, but the target vocabulary has "),
        (["--num-beams=4", "--num-beam-groups=3"], "num_beam_groups=3 does not divide num_beams=4"),
        (["--force-word", "zwei"], "the target vocabulary cannot spell the forced word 'zwei'"),
        (["--force-word", "two", "--compare"], "--force-word goes with neither --compare nor --force-words-ids"),
        (["--guidance-scale", "2"], "no such option: --guidance-scale; the nearest valid one is "),
    ],
)
def test_generation_options_that_cannot_work_are_one_line(model, arguments, sentence):
    result = dragoman_command("generate", model, *arguments, text="uno\n")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "kept", "sentence"),
    [
        ("model.safetensors", 1000, "the weights in {folder} are damaged or incomplete ("),
        ("tokenizer.json", 1, "the tokenizer in {folder} cannot be loaded: a file is damaged: "),
        ("tokenizer.json", None, "the tokenizer in {folder} cannot be loaded: tokenizer.json is missing, "),
    ],
)
def test_damaged_models_are_one_line(model, tmp_path, name, kept, sentence):
    folder = shutil.copytree(model, tmp_path / "damaged")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kept is not None:
        (folder / name).write_bytes(content[:kept])
    result = dragoman_command("generate", folder, text="uno\n")
    assert result.exit_code == 2
    assert f"dragoman generate: {sentence.format(folder=folder)}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_no_text_or_no_folder_is_one_line(model, tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    result = dragoman_command("train", tmp_path / "file")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"dragoman train: {tmp_path}/file: not a text file in UTF-8 (byte 1)")
    result = dragoman_command("masks", model, "uno", "--out", tmp_path / "file" / "masks.png")
    assert result.exit_code == 2
    assert result.stderr == f"dragoman masks: {tmp_path}/file: File exists\n"
    result = dragoman_command("generate", model, text="uno\nd\0e\n")
    assert result.exit_code == 2
    assert result.stderr == "dragoman generate: standard input:2: the line has a NUL character, so this is no text\n"


def test_more_options_of_generate(model):
    plain, biased, started = (
        dragoman_command("generate", model, "--max-new-tokens", "4", *options, text="uno\n")
        for options in ([], ["--sequence-bias", "[[[5], 99.0]]"], ["--decoder-start-token-id", "6"])
    )
    assert plain.exit_code == biased.exit_code == started.exit_code == 0
    (word,) = set(biased.stdout.split())
    assert load(model)[1].convert_tokens_to_ids(word) == 5
    assert plain.stdout != biased.stdout


def test_score_gives_a_table_that_is_pairs_again(model, tmp_path):
    rows = [("tre due", "due tre"), ("uno", "sei sei sei"), ("due", "due")]
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    result = dragoman_command("score", model, data, "--batch-size", "2", "--length-penalty", "0.5")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""  # no bars in a pipe
    scored = tmp_path / "scored.tsv"
    scored.write_text(result.stdout)
    pairs = read_pairs(scored)
    expected = list(score(*load(model), pairs, length_penalty=0.5))
    for row, one, (source, target) in zip(pairs, expected, rows, strict=True):
        assert (row["source"], row["target"]) == (source, target)
        assert float(row["score"]) == pytest.approx(one.score, abs=1e-4)
        assert float(row["log_probability"]) == pytest.approx(one.log_probability, abs=1e-4)
    without = dragoman_command("score", model, data, "--batch-size", "2", "--length-penalty", "0.5", "--no-header")
    assert without.stdout.splitlines() == result.stdout.splitlines()[1:]
    result = dragoman_command("score", model, data, "--jsonl")
    (_, second, _) = map(json.loads, result.stdout.splitlines())
    assert second["tokens"] == ["sei", "sei", "sei", "</s>"]
    assert sum(second["token_log_probabilities"]) == pytest.approx(second["log_probability"])
    assert second["score"] == pytest.approx(second["log_probability"] / 4)
    assert second["target"] == "sei sei sei"


def test_compare_two_evaluations(model, tmp_path):
    data = model.parent / "test.jsonl"
    strategies = ["--strategy", "greedy", "--strategy", "sampling"]
    assert dragoman_command("evaluate", model, data, *strategies, "--output", tmp_path).exit_code == 0
    files = [tmp_path / f"predictions.{name}.jsonl" for name in ("greedy", "sampling")]
    result = dragoman_command("compare", *files, "--metric", "chrf", "--samples", "20")
    assert result.exit_code == 0, result.stderr
    assert f"A: {files[0]}\nB: {files[1]}\n" in result.stdout
    (chrf,) = compare_predictions(*files, metrics=["chrf"], samples=20)
    (row,) = (line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["chrf"])
    assert row[1] == f"{chrf.scores[0]:.2f}"
    assert row[-4:] == [f"{chrf.difference:+.2f}", "±", f"{chrf.difference_interval:.2f}", f"{chrf.p_value:.4f}"]
    assert "bs:20" in result.stdout


COMMANDS = typer.main.get_command(dragoman.cli.app).commands


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_whole_and_has_examples_that_parse(name):
    result = CliRunner().invoke(dragoman.cli.app, [*filter(None, [name]), "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line.endswith(("...", "…")) and "Usage: " not in line] == []
    examples = re.findall(r"^ *(?:[^|\n]*\| )?(dragoman [a-z].*)$", result.stdout, re.MULTILINE)
    assert len(examples) >= (2 if name is None else 1)
    for example in examples:
        words = shlex.split(re.split(r" [<>|] ", example)[0])
        assert name in (None, words[1])
        command = COMMANDS[words[1]]
        context = command.make_context(words[1], words[2:])
        if context.args:
            parse_generation_options(context.args)


def test_no_command_is_help():
    assert dragoman_command().stdout == dragoman_command("--help").stdout == dragoman_command("-h").stdout
    assert dragoman_command("generate", "-h").stdout == dragoman_command("generate", "--help").stdout


@pytest.mark.parametrize(("command", "function"), [("evaluate", evaluate_model), ("compare", compare_predictions)])
def test_help_knows_the_default_metrics(command, function):
    (option,) = (parameter for parameter in COMMANDS[command].params if parameter.name == "metric")
    assert option.show_default == ", ".join(inspect.signature(function).parameters["metrics"].default)


def test_the_versions():
    result = dragoman_command("--version")
    assert result.stdout.splitlines() == [f"{name} {version(name)}" for name in ("dragoman", "transformers", "torch")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_the_shell(shell, monkeypatch):
    # otherwise Typer takes the shell that runs the tests, and the option no value
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(dragoman.cli.app, ["--show-completion", shell], prog_name="dragoman")
    assert result.exit_code == 0, result.stderr
    assert "_DRAGOMAN_COMPLETE" in result.stdout


def test_evaluate_a_name_on_the_hub(model, tmp_path, monkeypatch):
    def snapshot_download(name, revision, allow_patterns):
        assert name == "org/name"
        return model

    monkeypatch.setattr(sys.modules["dragoman.inference.loading"], "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # what the first wrote must not be taken for the model
        result = dragoman_command("evaluate", "org/name", model.parent / "test.jsonl")
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "evaluation" / "org--name" / "scores.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


def test_evaluate_two_parallel_text_files(model, tmp_path):
    (tmp_path / "source.txt").write_text("uno due\ntre\n")
    (tmp_path / "target.txt").write_text("due uno\ntre\n")
    result = dragoman_command("evaluate", model, tmp_path / "source.txt", "--target", tmp_path / "target.txt")
    assert result.exit_code == 0, result.stderr
    assert json.loads((model / "evaluation" / "scores.json").read_text())["rows"] == 2


def test_ctrl_c_ends_with_130_and_one_sentence(tmp_path, monkeypatch):
    from dragoman.training import run

    class Interrupting(run.Seq2SeqCollator):
        def __call__(self, features, return_tensors=None):
            os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(features, return_tensors)

    monkeypatch.setattr(run, "Seq2SeqCollator", Interrupting)
    # the Trainer makes the second batch while the first is in work, and the second Ctrl-C stops at once
    result = dragoman_command("train", write_experiment(tmp_path))
    assert result.exit_code == 130
    assert result.stderr.count("dragoman train: ") == 1


def test_the_command_without_the_package(tmp_path):
    """What it does before the package is imported, which a stand-in shows to be so."""
    (tmp_path / "dragoman").mkdir()
    (tmp_path / "dragoman" / "__init__.py").write_text("raise KeyboardInterrupt")
    script = "from dragoman_command import main; main()"

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(dragoman_command_module.__file__).parent}"}
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, env=environment
        )

    interrupted = run("train", "x.yaml")
    assert (interrupted.returncode, interrupted.stdout) == (130, "")
    assert interrupted.stderr == "dragoman: interrupted\n"
    asked = run("--version")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == dragoman_command("--version").stdout


@pytest.mark.slow
def test_the_installed_command():
    dragoman_program = Path(sys.executable).parent / "dragoman"
    result = subprocess.run([dragoman_program, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert [word for word in ("train", "generate", "evaluate") if word not in result.stdout] == []


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(model):
    generate = f"{sys.executable} -m dragoman generate {model} --max-new-tokens 1"
    command = f"yes 'uno due' | head -n 9999 | {generate} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stdout.count("\n") == 1
    assert "Error" not in result.stderr
    assert "Broken pipe" not in result.stderr


def test_attention_says_what_it_wrote(model, tmp_path):
    paths = [tmp_path / name for name in ("map.html", "map.npy")]
    result = dragoman_command("attention", model, "uno due", "--out", paths[0], "--out", paths[1])
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == [f"The map is in {paths[0]}", f"The weights are in {paths[1]}"]
