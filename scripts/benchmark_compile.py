"""Compiled decoding: a static cache and `torch.compile` against the loops as they are, for sources of several lengths.

    python scripts/benchmark_compile.py --output scripts/results/compile.md
    python scripts/benchmark_compile.py --d-model 32 --layers 1 --vocab-size 90 --new-tokens 6 --lengths 5 --lengths 7

BART of Transformers and its conversion decode greedily with the same weights, in one process, taking turns: each as it
is, and with `cache_implementation="static"`, whose steps are compiled. A step is compiled when a length is
new to it; that call is not timed, but counted. On a GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from benchmark_generation import Work, batch_of, both_sides
from benchmark_jobs import read_model
from measuring import spread, take_turns
from torch._dynamo.utils import counters
from transformers import CompileConfig


def compiling(backend: str) -> CompileConfig:
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True  # the host compiles on accelerators alone unless told so
    return config


def measure(
    model: Any, work: Work, batch: dict[str, torch.Tensor], repeats: int, backend: str
) -> tuple[list[list[float]], bool, int]:
    """Seconds of (as it is, compiled) in every turn, whether they find the same tokens, and graphs compiled for it."""
    before = counters["stats"]["unique_graphs"]
    static = {"cache_implementation": "static", "compile_config": compiling(backend)}
    times, found = take_turns(
        [lambda more=more: model.generate(**batch, **work.arguments(), **more).tolist() for more in ({}, static)],
        repeats,
    )
    return times, found[0] == found[1], counters["stats"]["unique_graphs"] - before


def main(
    lengths: Annotated[list[int] | None, typer.Option(help="Of the sources, one after another.")] = None,
    repeats: Annotated[int, typer.Option(help="Turns of every side, after one that does not count.")] = 5,
    batch_size: int = 16,
    d_model: int = 512,
    layers: Annotated[int, typer.Option(help="Of each stack.")] = 6,
    vocab_size: int = 8000,
    new_tokens: int = 48,
    threads: int = 2,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, {name}, fp32, {backend}. Greedy, "
        f"{batch_size} sources, {new_tokens} new tokens; d={d_model}, {layers}+{layers} layers, vocabulary "
        f"{vocab_size}; milliseconds a step, medians of {repeats} turns; ratios with quartiles.",
        "",
        "| source length | BART | compiled | graphs | ours | compiled | graphs | equal tokens "
        "| ours as it is / compiled | compiled, BART / ours |",
        "|--:|--:|--:|--:|--:|--:|--:|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        host, ours = (
            read_model(folder).to(device) for folder in both_sides(Path(scratch), "bart", d_model, layers, vocab_size)
        )
        for length in lengths or (20, 27, 32, 40, 60):
            work = Work(batch_size, length, new_tokens)
            batch = {name: part.to(device) for name, part in batch_of(work, vocab_size).items()}
            cells, taken, same = [], [], True
            for model in (host, ours):
                times, equal, graphs = measure(model, work, batch, repeats, backend)
                cells += [f"{1000 * statistics.median(side) / new_tokens:.1f}" for side in times] + [str(graphs)]
                taken.append(times)
                same = same and equal
            lines.append(
                f"| {length} | {' | '.join(cells)} | {'all' if same else 'not all'} | {spread(*taken[1])} "
                f"| {spread(taken[0][1], taken[1][1])} |"
            )
            print(lines[-1], flush=True)
    if output is not None:
        output.write_text("\n".join(["# Compiled decoding", "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
