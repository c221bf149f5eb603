"""The scripts a person runs, as far as they can be run without a network and without minutes of training."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from commands import load_script, run_script
from dragoman import DragomanConfig, DragomanForConditionalGeneration
from dragoman.data.tokenizers import train_tokenizer


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the installation reads, and a PATH without Python."""
    (tmp_path / "repository").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "repository" / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "repository")
    (tmp_path / "bin").mkdir()
    for program in ("bash", "cat", "cksum", "dirname", "mkdir", "mv", "rm", "sed"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    return tmp_path


def add_python(checkout, version):
    """A stand-in for Python that knows its version and answers every call with a line in calls.txt."""
    python = checkout / "bin" / "python3"
    python.write_text(
        f"""#!/bin/bash
echo "$@" >> {checkout}/calls.txt
case "$*" in
    *version_info*) exit {int(version < (3, 11))} ;;
    "-m venv"*) mkdir -p .venv/bin; cp {python} .venv/bin/python; echo "# nothing" > .venv/bin/activate ;;
esac
"""
    )
    python.chmod(0o755)
    (checkout / "bin" / "cp").symlink_to(shutil.which("cp"))
    # A stand-in for tar, which is called with -xzf ARCHIVE -C FOLDER MEMBER.
    tar = checkout / "bin" / "tar"
    tar.write_text('#!/bin/bash\nmkdir -p "$4/$5"\n')
    tar.chmod(0o755)


def install(checkout, extra=""):
    script = f"source {checkout}/repository/scripts/install.sh && install {extra} && pwd"
    return run("bash", "-euc", script, cwd="/", env={"PATH": str(checkout / "bin")})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_executable(script):
    assert run("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)


def test_a_machine_without_python_is_told_so(checkout):
    result = install(checkout)
    assert result.returncode != 0
    assert result.stderr == "Dragoman needs Python 3.11 or newer, and none is on the PATH\n"


def test_an_old_python_is_not_used(checkout):
    add_python(checkout, (3, 10))
    result = install(checkout)
    assert result.returncode != 0
    assert "Dragoman needs Python 3.11 or newer" in result.stderr


def test_the_second_installation_does_nothing(checkout):
    add_python(checkout, (3, 11))
    calls = checkout / "calls.txt"
    first = install(checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(checkout / "repository")
    assert "-m pip install --quiet --constraint scripts/constraints.txt --editable .\n" in calls.read_text()

    calls.write_text("")
    assert install(checkout).returncode == 0
    assert calls.read_text() == ""

    assert install(checkout, "dev").returncode == 0
    assert "--editable .[dev]\n" in calls.read_text()
    assert "-m venv" not in calls.read_text()
    (version,) = re.findall("^transformers==(.*)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE)
    assert calls.read_text().splitlines()[-1].endswith(f"--dest .venv/sdist transformers=={version}")
    assert (checkout / "repository" / ".venv" / f"transformers-{version}" / "tests").is_dir()
    calls.write_text("")
    assert install(checkout, "dev").returncode == 0
    assert install(checkout).returncode == 0  # what the tests need includes what the quickstart needs
    assert calls.read_text() == ""

    with (checkout / "repository" / "scripts" / "constraints.txt").open("a") as constraints:
        constraints.write("numpy==2.4.6\n")
    assert install(checkout).returncode == 0
    assert "pip install" in calls.read_text()


def test_every_dependency_is_pinned():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = [re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower() for requirement in needed]
    assert [name for name in names if name not in pins] == ["dragoman"]  # [dev] holds the other extras
    assert pins["torch"] == "2.13.0"


def test_the_quickstart_sentences_are_new():
    from dragoman.data.reading import embedded_names, read_pairs

    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    sentences = re.search(r"<<'SENTENCES'\n(.*)\nSENTENCES", text, re.DOTALL)[1].splitlines()
    assert len(sentences) == 5
    known = {source.lower() for name in embedded_names() for source in read_pairs(name)["source"]}
    assert [sentence for sentence in sentences if sentence.lower() in known] == []


@pytest.mark.parametrize("given", [[], ["training.output_dir=runs/my model", "model.d_model=64"], ["--resume"]])
def test_the_quickstart_translates_with_what_it_trained(checkout, given):
    add_python(checkout, (3, 11))
    calls = checkout / "dragoman.txt"
    program = checkout / "bin" / "dragoman"
    program.write_text(f'#!/bin/bash\nprintf "%s|" "$@" >> {calls}\necho >> {calls}\n')
    program.chmod(0o755)
    script = checkout / "repository" / "scripts" / "quickstart.sh"
    result = run("bash", script, *given, cwd="/", env={"PATH": str(checkout / "bin")})
    assert result.returncode == 0, result.stderr
    folder = "runs/my model" if "model.d_model=64" in given else "runs/quickstart"
    earlier = "--resume" if "--resume" in given else "--overwrite"
    train, generate = calls.read_text().splitlines()
    assert train.startswith("train|configs/quickstart.yaml|")
    assert train.endswith(f"training.output_dir={folder}|{earlier}|")
    assert [override for override in given if override not in train] == []
    assert generate == f"generate|{folder}|--compare|"


@pytest.mark.slow
def test_a_wheel_holds_everything(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("src", "configs"):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    result = run(*pip, "--wheel-dir", tmp_path, source)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(elsewhere)
    script = """
import dragoman
from dragoman.data.reading import read_pairs
from dragoman.evaluation.scores import METRICS, load_metric
from dragoman.training.arguments import preset, preset_names
print(dragoman.__file__)
print([len(read_pairs(f"embedded:tiny_en_it/{split}")) for split in ("train", "validation", "test")])
print([load_metric(name).name for name in METRICS] != [])
print([preset(name, vocab_size=9).vocab_size for name in preset_names()])
"""
    result = run(sys.executable, "-c", script, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(elsewhere)})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == str(elsewhere / "dragoman" / "__init__.py")
    assert lines[1:3] == ["[7217, 356, 439]", "True"]
    assert set(eval(lines[3])) == {9}
    assert (elsewhere / "dragoman" / "configs" / "quickstart.yaml").is_file()
    assert (elsewhere / "dragoman_command.py").is_file()  # of the entry point


def test_lead_words(tmp_path):
    data = tmp_path / "pairs.tsv"
    data.write_text("a small cat sleeps here\ta small cat\n")
    three, five = (run_script("lead_words.py", data, "--words", words) for words in (3, 5))
    assert three.splitlines() == ["rouge1: 1.0000", "rouge2: 1.0000", "rougeL: 1.0000"]
    assert five.splitlines() == ["rouge1: 0.7500", "rouge2: 0.6667", "rougeL: 0.7500"]


def test_benchmark_of_generation(tmp_path):
    """Small sizes: both sides give the same tokens, and the cache of five beams has a fifth of the bytes."""
    report = tmp_path / "report.md"
    done = run(
        sys.executable, ROOT / "scripts" / "benchmark_generation.py", "--peer", "marian", "--d-model", 32,
        "--layers", 1, "--vocab-size", 90, "--new-tokens", 4, "--repeats", 2, "--threads", 1,
        "--row", "greedy", "--row", "beam", "--row", "contrastive", "--output", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in report.read_text(encoding="utf-8").splitlines() if "| marian |" in line]
    assert [row[8] for row in rows] == ["16 of 16", "16 of 16", "8 of 8"]
    host, ours = map(float, rows[1][9].removesuffix(" |").split(" : "))
    assert host == pytest.approx(5 * ours, rel=0.1)


def test_benchmark_of_compiled_decoding(tmp_path):
    """The same tokens from steps that are compiled once for the lengths of a bucket."""
    torch.compiler.reset()
    script = load_script("benchmark_compile")
    _, ours = script.both_sides(tmp_path, "bart", d_model=16, layers=1, vocab_size=90)
    model = script.read_model(ours)
    for length, expected in ((7, 1), (5, 0)):
        work = script.Work(rows=2, source_length=length, new_tokens=3)
        _, same, graphs = script.measure(model, work, script.batch_of(work, 90), repeats=1, backend="eager")
        assert same
        assert graphs == expected


PAIRS = [
    {"source": "a small cat sleeps here", "target": "un gatto"},
    {"source": "the cat", "target": "il gatto"},
    {"source": "a cat sleeps", "target": "un gatto dorme"},
]


def save_marian(folder, **changes):
    """A model of Marian's shape, with its tokenizer."""
    tokenizer = train_tokenizer([pair["source"] for pair in PAIRS], kind="char")
    torch.manual_seed(0)
    shape = {
        "d_model": 12, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 17, "decoder_ffn_dim": 19, "norm_type": "layernorm",
        "norm_position": "post", "final_norm": False, "activation_function": "swish", "gated_mlp": False,
        "attention_bias": True, "mlp_bias": True, "position_embedding_type": "sinusoidal", "sinusoid_layout": "halves",
        "scale_embedding": True, "lm_head_bias": True, "max_position_embeddings": 30, "dropout": 0.0,
    }  # fmt: skip
    model = DragomanForConditionalGeneration(DragomanConfig(vocab_size=len(tokenizer), **{**shape, **changes}))
    model.generation_config.max_length = 9
    model.generation_config.suppress_tokens = [tokenizer.pad_token_id]  # which a trained one does not write
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_benchmark_of_whole_jobs(tmp_path):
    pytest.importorskip("ctranslate2", reason="needs the extra [export]")
    model, other = save_marian(tmp_path / "deep"), save_marian(tmp_path / "shallow", encoder_layers=1)
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    report = tmp_path / "report.md"
    done = run(
        sys.executable, ROOT / "scripts" / "benchmark_generation.py", "--row", "job", "--row", "ctranslate2",
        "--row", "deep_shallow", "--row", "refill", "--model", model, "--other", other, "--clock", "cpu",
        "--data", tmp_path / "test.jsonl", "--threads", 1, "--repeats", 2, "--output", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = report.read_text(encoding="utf-8")
    assert text.splitlines()[2:] == done.stdout.rstrip().splitlines()
    assert "the host's Marian with the same weights, generate() on batches of 32 in file order" in text
    assert "3 of 3 outputs have the same tokens" in text
    assert "deep (2+1 layers, " in text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    single, eight_bits, difference, _ = rows["| CTranslate2 int8 export (our fp32), chrF"]
    assert float(difference.split(" ± ")[0]) == pytest.approx(float(eight_bits) - float(single), abs=0.011)
    for peer in (
        "whole job (the host's Marian)", "CTranslate2 int8 export (our fp32)", "shallow (deep)"
    ):  # fmt: skip
        theirs, ours, ratio, _ = rows[f"| {peer}, sentences per second of the processor"]
        assert float(theirs) > 0 < float(ours)
        assert ratio.startswith("**")
    left = rows["| beam 1"][0]
    assert 85 < float(left.removesuffix("%")) < 100  # of 32 places, three are ever taken


@pytest.fixture(scope="module")
def jobs():
    return load_script("benchmark_jobs")


@pytest.mark.parametrize(
    ("changes", "peer"),
    [
        ({"norm_position": "pre"}, "loops"),
        (
            {
                "position_embedding_type": "learned", "sinusoid_layout": "interleaved", "embedding_norm": True,
                "lm_head_bias": False, "activation_function": "gelu", "scale_embedding": False,
            },
            "BART",
        ),
    ],
)  # fmt: skip
def test_a_model_that_marian_cannot_be(jobs, tmp_path, changes, peer):
    """It meets the host's BART where it is one, and else the host's loops."""
    sentences, references = ([pair[side] for pair in PAIRS] for side in ("source", "target"))
    job = jobs.Job("test", sentences, references, repeats=1, threads=1, clock="cpu")
    text = jobs.against_stock(job, save_marian(tmp_path / "model", **changes), tmp_path)[0]
    assert f"each side once, model: the host's {peer} with the same weights" in text
    assert "3 of 3 outputs have the same tokens" in text


def test_differences_of_tokens_are_explained(jobs, tmp_path):
    """Outputs that differ by rounding are equal in float64; one that another model made is not."""
    sentences, references = ([pair[side] for pair in PAIRS] for side in ("source", "target"))
    job = jobs.Job("test", sentences, references, repeats=1, threads=1, clock="cpu")
    model, tokenizer = jobs.load(save_marian(tmp_path / "model"), "cpu")
    _, stock = jobs.host_with_weights_of(model, tmp_path)
    stock.generation_config = model.generation_config
    ours = job.translate(model, tokenizer)
    changed = [jobs.Hypothesis("x", [*ours[0].token_ids[:-1], 5], ours[0].start_id), *ours[1:]]
    told = jobs.differences(model, stock, tokenizer, job, [ours, changed])
    assert told == (
        "2 of 3 outputs have the same tokens. Of the other 1, 0 differ in score by less than 1e-5; in float64 1 are "
        "equal."
    )
    torch.nn.init.normal_(stock.model.decoder.layers[0].fc1.weight)
    theirs = jobs.stock_generate(stock, tokenizer, sentences, job.beams)
    told = jobs.differences(model, stock, tokenizer, job, [theirs, ours])
    assert told.endswith("Of the other 3, 0 differ in score by less than 1e-5; in float64 0 are equal.")


def test_scaling_on_paper(capsys):
    """Twice the GPUs take half the time of a job that does not wait for gradients."""
    load_script("scaling").main(gpu="A100,312,300,25,80", d_model=64)
    printed = capsys.readouterr().out
    assert re.match(r"On this machine, one thread, d=64: bare products \d+ GFLOP/s, training steps \d+", printed)
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| WMT", "| a billion"))]
    assert [row[3] for row in table] == ["1", "8", "64"] * 2
    hours = [float(row[7].replace(",", "")) for row in table[3:]]
    assert hours[0] / 8 == pytest.approx(hours[1], rel=0.01)
    assert hours[0] > hours[1] > hours[2]


def test_benchmark_of_training(tmp_path, capsys):
    """Small sizes: all sides train, at equal numbers of target tokens, and ours pads less than random batches."""
    load_script("benchmark_training").main(
        row=["speed", "step"], data=Path("embedded:tiny_en_it/train"), pairs=90, batch_size=3, d_model=16, layers=1,
        vocab_size=300, steps=1, turns=1, output=tmp_path / "report.md",
    )  # fmt: skip
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[0] in report
    speeds = {
        row[0]: row for row in re.findall(r"^\| (.+?), (.+?) \| .+?\| (\d+) \| ([\d.]+)% \|", report, re.MULTILINE)
    }
    assert speeds.keys() == {"ours", "marian", "bart", "t5"}
    tokens = [int(row[2]) for row in speeds.values()]
    assert max(tokens) < 1.2 * min(tokens)
    assert float(speeds["ours"][3]) < float(speeds["t5"][3])
    steps = re.findall(r"^\| (\w+) \| (\d+) \| (.*)\|$", report.partition("## Bare step")[2], re.MULTILINE)
    assert [side for side, *_ in steps] == ["ours", "marian", "bart", "t5"]


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_left_alone(tmp_path):
    """Two kills, in training; the harness says itself whether anything differs."""
    command = [sys.executable, ROOT / "scripts" / "kill_and_resume.py", "--kills", 2, "--pairs", 60, "--seed", 3]
    done = run(*command, "--output", tmp_path / "report.md", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    kills = re.findall(r"^\| .+? \| (\d) \| (SIG\w+) \| .+? \| \S+ \| (\S+) \| (\S+) \|$", report, re.MULTILINE)
    assert [number for number, *_ in kills] == ["1", "2"]
    assert "all ended with the weights, averages, optimizers and scores of the runs that were left alone" in report
