"""The README is true: its commands and its Python run, with fewer steps; its paths, presets and options exist."""

import gzip
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest

from commands import run_line, run_script
from dragoman.data import reading
from dragoman.training.arguments import preset, preset_names
from hub.server import serve, used_here


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
DRAGOMAN = [command for command in COMMANDS if command.startswith("dragoman ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as the README's reader has it after the quickstart, but with few pairs and a model of a few steps."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "configs").symlink_to(ROOT / "configs")
    embedded = Path("src/dragoman/data/embedded")
    (folder / embedded / "tiny_en_it").mkdir(parents=True)
    (folder / "src" / "dragoman" / "evaluation").symlink_to(ROOT / "src" / "dragoman" / "evaluation")
    for split, pairs in (("train", 900), ("validation", 30), ("test", 30)):
        path = embedded / "tiny_en_it" / f"{split}.jsonl.gz"
        lines = gzip.decompress((ROOT / path).read_bytes()).splitlines(keepends=True)
        (folder / path).write_bytes(gzip.compress(b"".join(lines[:pairs])))
    (folder / "mine.tsv").write_text("".join(f"file {number}\tdocumento {number}\n" for number in range(50)))
    (folder / "lines.txt").write_text("Delete the selected files\n\nOpen the settings page\n")
    every_step = "eval_strategy=steps save_strategy=steps eval_steps=1 save_steps=1".replace(" ", " training.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "EMBEDDED_DIR", folder / embedded)
        run(folder, f"dragoman train configs/quickstart.yaml training.output_dir=runs/quickstart training.{every_step}")
        yield folder


def run(folder: Path, command: str) -> str:
    shorter = command
    if command.startswith("dragoman train"):
        small = "model.d_model=16 model.encoder_ffn_dim=8 model.decoder_ffn_dim=8 generation.max_length=9"
        shorter += f" training.max_steps=2 training.disable_tqdm=true training.predict_with_generate=false {small}"
        shorter += " training.metric_for_best_model=loss training.num_train_epochs=1"
        if "output_dir" not in command and "languages" not in command:
            shorter += f" training.output_dir=runs/{'resumed' if '--resume' in command else 'again'}"
    with chdir(folder):
        return run_line(shorter)


def answers(folder: Path, command: str) -> bool:
    """Start a server on a free port, ask for its page, and end it with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "dragoman", *shlex.split(command)[1:], "--port", str(port)]
    # Tests that run in the background ignore Ctrl-C, and would hand that on.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True, preexec_fn=hears) as server:
        address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
        with urllib.request.urlopen(address, timeout=30) as page:
            found = "Dragoman" in page.read().decode()
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", DRAGOMAN)
def test_commands_run(home, command, tmp_path):
    if command.startswith("dragoman push"):
        with serve() as hub, used_here(hub, tmp_path):
            assert run(home, command).startswith("runs/quickstart is now http://")
        return
    if command.startswith("dragoman generate") and not (home / command.split()[2]).is_dir():
        name = Path(command.split()[2]).name
        run(home, next(one for one in DRAGOMAN if one.startswith("dragoman train") and name in one))
    if command.startswith("dragoman compare") and not (home / command.split()[-1]).is_file():
        run(home, "dragoman evaluate runs/quickstart embedded:tiny_en_it/test --strategy greedy --strategy beam")
    if command.startswith("dragoman demo"):
        pytest.importorskip("gradio", reason="the page needs the extra [demo]")
        assert answers(home, command)
        return
    output = run(home, command)
    if command.startswith("dragoman attention"):
        assert "looked at" in output
        assert [name for name in re.findall(r"--out (\S+)", command) if not (home / name).is_file()] == []
    if command.startswith("dragoman generate") and ">" not in command.split("<")[-1]:
        number = int(re.search(r"--nbest (\d+)", command)[1]) if "--nbest" in command else 1
        assert output.count("\n") == 3 * number
    if command.startswith("dragoman evaluate"):
        for strategy in re.findall(r"--strategy (\w+)", command):
            assert strategy in output


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(home, number):
    shorter = blocks("python")[number].replace("num_train_epochs=8", "max_steps=2")
    with chdir(home):
        exec(shorter, {})


def test_the_scripts_named_exist():
    scripts = re.findall(r"(?:bash|launch|python) (scripts/[\w.]+)", README)
    assert {"scripts/quickstart.sh", "scripts/test.sh", "scripts/train.py"} <= set(scripts)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("script", ["parity.py", "conformance.py", "benchmark_generation.py"])
def test_tables_are_the_recorded_ones(script):
    table = run_script(script, "--show")
    assert table.count("\n") > 8
    assert table in README


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_preset_is_named():
    assert [name for name in preset_names() if f"`{name}`" not in README] == []
    for name in preset_names():
        preset(name)
