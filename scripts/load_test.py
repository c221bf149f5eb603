"""Many clients at once against `dragoman serve` on the loopback: right answers, flat memory, latency, throughput.

    python scripts/load_test.py runs/quickstart --output scripts/results/serving.md   # 64 clients, twice a minute
    python scripts/load_test.py runs/quickstart --clients 8 --seconds 5               # a trial

Every client sends one text after the other over one connection, with one of two settings, and compares each answer with
the one that `translate` gave for that text alone; one request in twenty is malformed or oversized and must be refused.
The second run is a server with --max-batch-size 1. The exit status is 1 if anything is not as it should be.
"""

import asyncio
import json
import platform
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import torch
import typer
from transformers.utils.logging import disable_progress_bar

from dragoman.apps.limits import Limits
from dragoman.data.reading import read_pairs
from dragoman.inference.loading import load
from dragoman.inference.translate import translate


SETTINGS = [{"num_beams": 1}, {"num_beams": 4}]
JSON = {"Content-Type": "application/json"}
# Body and the status that it must be refused with.
BAD_REQUESTS = [
    (b"{", 400),
    (b'{"text": 5}', 422),
    (b'{"text": "a", "num_beems": 2}', 422),
    (b'{"text": "a", "num_beams": 1000000}', 422),
    (b'{"text": "a", "max_new_tokens": 1000000}', 422),
    (json.dumps({"text": ["a"] * (Limits.max_texts + 1)}).encode(), 422),
    (json.dumps({"text": "a" * (Limits.max_characters + 1)}).encode(), 422),
    (json.dumps({"text": "a" * Limits.max_body_bytes}).encode(), 413),
]
SHARE_OF_BAD_REQUESTS = 0.05
GROWTH = 1.05  # of the memory after the first quarter of a run, which counts as flat
SPEEDUP = 3.0  # asked of batching


@dataclass
class Run:
    """What came of one server."""

    seconds: list[float] = field(default_factory=list)  # of each right answer
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    not_refused: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # resident bytes at the quarters
    mean_batch: float = 0.0
    duration: float = 0.0
    exit_status: int | None = None

    @property
    def throughput(self) -> float:
        return len(self.seconds) / self.duration

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[min(int(share * len(self.seconds)), len(self.seconds) - 1)]

    def faults(self) -> list[str]:
        found = [*self.wrong[:3], *self.not_refused[:3]]
        if self.memory[-1] > GROWTH * self.memory[1]:
            found.append(f"memory grew from {self.memory[1]} to {self.memory[-1]} bytes after the first quarter")
        if self.exit_status != 0:
            found.append(f"the server ended with {self.exit_status} after SIGTERM")
        return found


def expected_answers(model: str, texts: list[str]) -> tuple[list[tuple[str, dict, str]], int]:
    """(text, settings, output) for texts whose output is the same alone and in a batch; and how many are not.

    Padding changes the order of sums in floating point, which may decide between two outputs of equal score.
    """
    loaded, tokenizer = load(model)
    rows, unstable = [], 0
    for settings in SETTINGS:
        length = {"max_new_tokens": min((loaded.generation_config.max_length or 21) - 1, Limits.max_new_tokens)}
        alone = translate(loaded, tokenizer, texts, batch_size=1, scores=False, **settings, **length)
        together = translate(loaded, tokenizer, texts, batch_size=32, scores=False, **settings, **length)
        for text, [one], [other] in zip(texts, alone, together, strict=True):
            if one.text == other.text:
                rows.append((text, {**settings, **length}, one.text))
            else:
                unstable += 1
    return rows, unstable


async def client(url: str, rows: list[tuple[str, dict, str]], until: float, seed: int, run: Run) -> None:
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.perf_counter() < until:
            if chance.random() < SHARE_OF_BAD_REQUESTS:
                body, status = chance.choice(BAD_REQUESTS)
                response = await http.post("/translate", content=body, headers=JSON)
                if response.status_code == status:
                    run.refused += 1
                else:
                    run.not_refused.append(f"{response.status_code} instead of {status} for {body[:60]!r}")
                continue
            text, settings, output = chance.choice(rows)
            start = time.perf_counter()
            response = await http.post("/translate", json={"text": text, **settings})
            answer = response.json()
            if response.status_code == 200 and [[one["text"] for one in found] for found in answer["outputs"]] == [
                [output]
            ]:
                run.seconds.append(time.perf_counter() - start)
            else:
                run.wrong.append(f"{text!r} {settings}: {output!r} was expected, not {response.status_code} {answer}")


async def watch_memory(process: psutil.Process, seconds: float, run: Run) -> None:
    for quarter in range(5):
        run.memory.append(process.memory_info().rss)
        if quarter < 4:
            await asyncio.sleep(seconds / 4)


async def load_run(url: str, pid: int, rows: list[tuple[str, dict, str]], clients: int, seconds: float) -> Run:
    run = Run()
    start = time.perf_counter()
    numbers = range(clients)
    watcher = watch_memory(psutil.Process(pid), seconds, run)
    await asyncio.gather(watcher, *(client(url, rows, start + seconds, number, run) for number in numbers))
    run.duration = time.perf_counter() - start
    metrics = httpx.get(f"{url}/metrics").text
    total, count = (
        float(re.search(rf"^dragoman_batch_sentences_{name} (.+)", metrics, re.M)[1]) for name in ("sum", "count")
    )
    run.mean_batch = total / count
    return run


def serve_and_load(model: str, rows: list[tuple[str, dict, str]], clients: int, seconds: float, *options: str) -> Run:
    command = [sys.executable, "-m", "dragoman", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = re.search(r"http://\S+", server.stdout.readline())
            if ready is None:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            asyncio.run(load_run(ready[0], server.pid, rows, clients, seconds / 6))  # pages and caches
            run = asyncio.run(load_run(ready[0], server.pid, rows, clients, seconds))
            server.send_signal(signal.SIGTERM)
            run.exit_status = server.wait(timeout=60)
        finally:
            server.kill()
    return run


def table(runs: dict[str, Run]) -> str:
    def megabytes(run: Run) -> str:
        return " ".join(f"{size / 2**20:.0f}" for size in run.memory)

    rows = {
        "seconds": lambda run: f"{run.duration:.1f}",
        "right answers": lambda run: f"{len(run.seconds):,}",
        "wrong or crossed answers": lambda run: f"{len(run.wrong)}",
        "bad requests, refused with the right status": lambda run: f"{run.refused:,}",
        "bad requests, anything else": lambda run: f"{len(run.not_refused)}",
        "answers a second": lambda run: f"{run.throughput:.1f}",
        "sentences decoded together, mean": lambda run: f"{run.mean_batch:.1f}",
        **{
            f"latency, {name}": lambda run, share=share: f"{1000 * run.percentile(share):,.0f} ms"
            for name, share in (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("longest", 1.0))
        },
        "resident memory at the quarters, MB": megabytes,
        "exit status after SIGTERM": lambda run: f"{run.exit_status}",
    }
    lines = [f"| | {' | '.join(runs)} |", "|---|" + "--:|" * len(runs)]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, runs.values()))} |" for name, cell in rows.items()])


def main(
    model: Annotated[str, typer.Argument(help="Folder of a trained model, or its name on the Hub.")],
    data: Annotated[str, typer.Option(help="Pairs; their sources are sent.")] = "embedded:tiny_en_it/test",
    different: Annotated[int, typer.Option(help="Texts, at most.")] = 400,
    clients: Annotated[int, typer.Option(help="At once.")] = 64,
    seconds: Annotated[float, typer.Option(help="Of each of the two runs.")] = 60.0,
    compare: Annotated[bool, typer.Option(help="Also a server that decodes one at a time.")] = True,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    disable_progress_bar()
    texts = list(dict.fromkeys(read_pairs(data)["source"]))[:different]
    rows, unstable = expected_answers(model, texts)
    runs = {"batching": serve_and_load(model, rows, clients, seconds)}
    if compare:
        runs["one at a time"] = serve_and_load(model, rows, clients, seconds, "--max-batch-size", "1")
    faults = [f"{name}: {fault}" for name, run in runs.items() for fault in run.faults()]
    lines = [
        "# Serving under load",
        f"`python {' '.join(['scripts/load_test.py', *sys.argv[1:]])}`",
        f"{clients} clients, {psutil.cpu_count()} CPU cores shared by clients and server, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, Python {platform.python_version()}; "
        f"{len(texts)} texts with {' or '.join(map(json.dumps, SETTINGS))}, of which {unstable} were left out because "
        "rounding decides about their output.",
        table(runs),
    ]
    if compare:
        speedup = runs["batching"].throughput / runs["one at a time"].throughput
        lines.append(f"Batching gives {speedup:.2f} times the throughput of one at a time.")
        if speedup < SPEEDUP:
            faults.append(f"batching gives {speedup:.2f} times the throughput, less than {SPEEDUP:g}")
    lines.append("Faults: " + ("none." if not faults else "\n\n" + "\n".join(f"- {fault}" for fault in faults)))
    report = "\n\n".join(lines) + "\n"
    print(report)
    if output is not None:
        output.write_text(report, encoding="utf-8")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
