"""Kill small training runs at random moments, resume them, and compare their end with that of an uninterrupted run.

    python scripts/kill_and_resume.py
    python scripts/kill_and_resume.py --kills 20 --output scripts/results/kill_and_resume.md

Each run is a process of its own; while it trains it gets SIGKILL or SIGTERM, half of the times at any moment, half of
the times while a checkpoint is being written, and is started again with `--resume`, until it ends. Then its weights,
its average, its optimizer and its evaluations must be those of the run that was left alone, bit for bit. After every
kill the run must go on from the last checkpoint that was complete. The exit status is 1 if any of this fails.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from safetensors.torch import load_file

import dragoman.cli
import dragoman.training.run  # (imported before the processes are forked, so that each begins at once)
from dragoman.training.checkpoints import COMPLETE_FILE, complete_checkpoints, unfinished_checkpoints


SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.1}
RECURRENT = {"preset": "lstm_bahdanau", "embedding_dim": 24, "hidden_size": 32, "dropout": 0.1}
EVERY_STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "token budget, average, by epoch": {
        "model": {"preset": "modern", **SIZES},
        "data": {},
        "training": {"max_tokens_per_batch": 1200, "num_train_epochs": 3, "ema_decay": 0.9, "save_total_limit": 1},
    },
    "scheduled sampling, accumulation": {
        "model": RECURRENT,
        "data": {},
        "training": {
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "max_steps": 29,
            "teacher_forcing_schedule": {"kind": "linear", "k": 1.0, "slope": 0.02, "minimum": 0.3},
            **EVERY_STEPS,
        },
    },
    "stream, packing, inverse square root": {
        "model": {"preset": "modern", **SIZES},
        "data": {"streaming": True, "shuffle_buffer": 100, "max_source_length": 60, "max_target_length": 60},
        "training": {
            "max_tokens_per_batch": 600,
            "packing": True,
            "max_steps": 31,
            "lr_scheduler_type": "inverse_sqrt",
            **EVERY_STEPS,
        },
    },
}


def write_experiment(folder: Path, sections: dict[str, dict[str, Any]], pairs: int) -> Path:
    """The experiment as a file, on the first pairs of the embedded data."""
    embedded = Path(dragoman.__file__).parent / "data" / "embedded" / "tiny_en_it"
    paths = {}
    for split, count in (("train", pairs), ("validation", pairs // 20), ("test", pairs // 20)):
        with gzip.open(embedded / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            paths[split] = str(folder / f"{split}.jsonl")
            Path(paths[split]).write_text("".join(line for line, _ in zip(lines, range(count), strict=False)))
    training = {"use_cpu": True, "logging_steps": 5, "learning_rate": 3e-3, "disable_tqdm": True, "samples": 0}
    experiment = {
        "model": sections["model"],
        "data": {**paths, **sections["data"]},
        "tokenizer": {"vocab_size": 400},
        "generation": {"max_new_tokens": 20},
        "training": {**training, **sections["training"]},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def start(experiment: Path, output: Path, log: Path) -> int:
    """`dragoman train ... --resume` in a process of its own; its id."""
    process = os.fork()
    if process:
        return process
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["dragoman", "train", str(experiment), f"training.output_dir={output}", "--resume"]
    status = 1
    try:
        dragoman.cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int, until: float) -> int | None:
    """The exit status of a process, negative for a signal; None if it still runs at that time."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() >= until:
            return None
        time.sleep(0.001)


def wait_for(process: int, happened: Callable[[], bool]) -> int | None:
    """The exit status of a process that ends before that; else None, as soon as it has happened."""
    while not happened():
        status = wait(process, time.perf_counter() + 0.0005)
        if status is not None:
            return status
    return None


def trains(log: Path) -> bool:
    """Whether a run is about to make its first step: it has said how much memory that takes."""
    return log.exists() and "memory: " in log.read_text()


def writes(run: Path, begun: float) -> bool:
    """Whether a checkpoint is there without its marker that was not there at that time."""
    return any(changed_since(one, begun) for one in unfinished_checkpoints(run))


def changed_since(folder: Path, moment: float) -> bool:
    try:
        return folder.stat().st_mtime > moment
    except FileNotFoundError:  # deleted meanwhile
        return False


@dataclass(frozen=True)
class Whole:
    """A run that was left alone.

    Attributes:
        last: name of its last checkpoint.
        seconds: from its first step to that.
    """

    folder: Path
    last: str
    seconds: float


def leave_alone(place: Path) -> Whole:
    run, log = place / "whole", place / "whole.log"
    process = start(place / "experiment.yaml", run, log)
    status = wait_for(process, lambda: trains(log))
    begin = time.time()
    if status is not None or wait(process, float("inf")):
        raise RuntimeError(log.read_text())
    last = complete_checkpoints(run)[-1]
    return Whole(run, last.name, (last / COMPLETE_FILE).stat().st_mtime - begin)


def newest(run: Path) -> str:
    checkpoints = complete_checkpoints(run)
    return checkpoints[-1].name if checkpoints else "none"


def step_of(checkpoint: str) -> int:
    return 0 if checkpoint == "none" else int(checkpoint.rpartition("-")[2])


def differences(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same, bit for bit."""
    found = []
    folders = [complete_checkpoints(run)[-1] for run in (one, other)]
    if folders[0].name != folders[1].name:
        return [f"the last checkpoints are {folders[0].name} and {folders[1].name}"]
    for name in [*sorted(file.name for file in folders[1].glob("*.safetensors")), "../model.safetensors"]:
        weights, others = (load_file(folder / name) for folder in folders)
        found += [f"{name}: {key}" for key in others if not torch.equal(weights[key], others[key])]
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in folders]
    for number, moments in states[1].items():
        found += [f"optimizer: {key}" for key in moments if not torch.equal(states[0][number][key], moments[key])]
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (one, other)]
    scores = [[(log["step"], log["eval_loss"], log["eval_chrf"]) for log in run if "eval_loss" in log] for run in logs]
    found += ["evaluations"] * (scores[0] != scores[1])
    tests = [(run / "test_results.json").read_text() for run in (one, other)]
    return found + ["test scores"] * (tests[0] != tests[1])


def main(
    kills: Annotated[int, typer.Option(help="Signals that meet a run, in all.")] = 20,
    pairs: Annotated[int, typer.Option(help="Training pairs.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the moments and the signals.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    lines: list[str] = []
    failures: list[str] = []
    done = 0
    runs = 0
    in_writing = 0

    def say(line: str) -> None:
        lines.append(line)
        typer.echo(line)

    say("| run | kill | signal | moment | after seconds | began from | last complete checkpoint |")
    say("|---|--:|---|---|--:|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole: dict[str, Whole] = {}
        while done < kills:
            name = list(RUNS)[runs % len(RUNS)]
            place = folder / str(list(RUNS).index(name))
            if name not in whole:
                place.mkdir()
                write_experiment(place, RUNS[name], pairs)
                whole[name] = leave_alone(place)
            runs += 1
            run, log = place / f"killed-{runs}", place / f"killed-{runs}.log"
            status: int | None = None
            while status != 0:
                before = newest(run)
                log.unlink(missing_ok=True)
                begin, begun = time.perf_counter(), time.time()
                process = start(place / "experiment.yaml", run, log)
                status = wait_for(process, lambda log=log: trains(log))
                number = chance.choice([signal.SIGKILL, signal.SIGTERM])
                if status is not None or done == kills or before == whole[name].last:
                    pass
                elif chance.random() < 0.5:
                    status = wait_for(process, lambda run=run, begun=begun: writes(run, begun))
                    status = wait(process, time.perf_counter() + chance.uniform(0, 0.03)) if status is None else status
                else:
                    left = 1 - step_of(before) / step_of(whole[name].last)
                    status = wait(process, time.perf_counter() + chance.uniform(0, left * whole[name].seconds))
                if status is None and done < kills and newest(run) != whole[name].last:
                    seconds, last, writing = time.perf_counter() - begin, newest(run), writes(run, begun)
                    os.kill(process, number)
                    status = wait(process, float("inf"))
                    done, in_writing = done + 1, in_writing + writing
                    moment = "writing a checkpoint" if writing else "between checkpoints"
                    say(f"| {name} | {done} | {number.name} | {moment} | {seconds:.2f} | {before} | {last} |")
                else:
                    status = wait(process, float("inf")) if status is None else status
                    if status:
                        raise RuntimeError(log.read_text())
                resumed = re.search(r"Resuming from .*(checkpoint-\d+)|starting anew", log.read_text())
                if (resumed[1] or "none" if resumed else None) != before:
                    failures.append(f"{run.name} ({name}) went on from {resumed and resumed[1]} and not from {before}")
            found = differences(run, whole[name].folder)
            failures += [f"{run.name} ({name}): {difference}" for difference in found]
    say("")
    verdict = (
        "all ended with the weights, averages, optimizers and scores of the runs that were left alone, bit for bit"
    )
    say(
        f"{done} kills of {runs} runs, {in_writing} of them while a checkpoint was being written; "
        + (verdict if not failures else f"DIFFERENT: {'; '.join(failures)}")
        + "."
    )
    if output is not None:
        command = f"python scripts/kill_and_resume.py --kills {kills} --pairs {pairs} --seed {seed}"
        output.write_text(
            f"# Killed and resumed\n\n`{command}`, torch {torch.__version__}, one thread.\n\n" + "\n".join(lines) + "\n"
        )
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
