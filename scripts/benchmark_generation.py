"""Decoding with the same weights in Marian, BART and T5 of Transformers and here.

    python scripts/benchmark_generation.py --output scripts/results/generation.md
    python scripts/benchmark_generation.py --row job --model runs/NAME --data data/ddtp_en_it/test.jsonl.gz \\
        --output scripts/results/generation_job.md
    python scripts/benchmark_generation.py --row ctranslate2 --model runs/NAME --data data/ddtp_en_it/test.jsonl.gz
    python scripts/benchmark_generation.py --row deep_shallow --model runs/A --other runs/B --data FILE
    python scripts/benchmark_generation.py --row refill --model runs/NAME --data FILE
    python scripts/benchmark_generation.py --row greedy --peer marian --d-model 32 --vocab-size 90 --layers 1
    python scripts/benchmark_generation.py --show          # the records that lie beside this script, a line a work

Each peer is initialized at random, saved and converted, so that both sides hold the same weights. They decode the same
batch in one process, taking turns; a ratio is that of two neighbors, and its median and quartiles are printed. No
sentence may end before the given length, so that all sides do the same number of steps. Beside each side stands the
time of its bare matrix products: PyTorch's for the host, oneDNN's with packed weights for ours. Peak memory is that of
a process of its own for each side.

The other rows are whole files that trained models translate, taking turns: `job` against the host's `generate`,
`ctranslate2` an export in 8 bits, `deep_shallow` a second model, `refill` what free places in a batch could bring.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from benchmark_jobs import (
    HEADER,
    Job,
    against_another,
    against_ctranslate2,
    against_stock,
    idle_places,
    read_job,
    read_model,
    summary,
)
from measuring import memory_from_now, spread, take_turns
from torch import nn

from dragoman import DragomanForConditionalGeneration
from dragoman.conversion import convert
from dragoman.models.fast_linear import side_by_side


PEERS = ("marian", "bart", "t5")
JOBS = ("job", "ctranslate2", "deep_shallow", "refill")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Work:
    """A batch of sources, and how it is decoded."""

    rows: int
    source_length: int
    new_tokens: int
    beams: int = 1
    candidates: int = 0  # of contrastive search
    goal: float = 1.0  # times as fast as the fastest peer

    def arguments(self) -> dict[str, Any]:
        length = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False}
        return length | {"num_beams": self.beams}


ROWS = {
    "greedy": Work(16, 32, 48, goal=1.3),
    "beam": Work(16, 32, 48, beams=5, goal=1.5),
    "beam-256": Work(8, 256, 48, beams=5, goal=2.5),
    "beam-1000": Work(4, 1000, 48, beams=5, goal=3.0),
    "contrastive": Work(8, 32, 48, candidates=4, goal=1.5),
}


def peer_of(name: str, d_model: int, layers: int, vocab_size: int):
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    heads, ffn_dim = max(d_model // 64, 2), 4 * d_model
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=vocab_size, d_model=d_model, d_kv=d_model // heads, d_ff=ffn_dim, num_layers=layers,
            num_heads=heads, **ids,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "d_model": d_model, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads, "encoder_ffn_dim": ffn_dim,
        "decoder_ffn_dim": ffn_dim, "max_position_embeddings": 1100, "forced_eos_token_id": None, **ids,
    }  # fmt: skip
    if name == "marian":
        return transformers.MarianMTModel(transformers.MarianConfig(**sizes))
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))


def both_sides(folder: Path, name: str, d_model: int, layers: int, vocab_size: int) -> tuple[Path, Path]:
    """Folders of the peer and of its conversion."""
    theirs, ours = folder / f"{name}-theirs", folder / f"{name}-ours"
    if not ours.exists():
        peer_of(name, d_model, layers, vocab_size).save_pretrained(theirs)
        convert(theirs, ours)
    return theirs, ours


def batch_of(work: Work, vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (work.rows, work.source_length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def naive_contrastive(model, batch: dict[str, torch.Tensor], work: Work) -> torch.Tensor:
    """Contrastive search (Su 2022) with a cache, as one writes it first: everything is repeated for the candidates."""
    k, encoder_outputs = work.candidates, model.get_encoder()(**batch)
    ids = torch.zeros(work.rows, 1, dtype=torch.long)
    repeated = encoder_outputs.last_hidden_state.repeat_interleave(k, dim=0)
    step: dict[str, Any] = {"use_cache": True, "output_hidden_states": True}
    outputs = model(encoder_outputs=encoder_outputs, decoder_input_ids=ids, **step)
    states = outputs.decoder_hidden_states[-1]
    logits, cache = outputs.logits[:, -1], outputs.past_key_values
    for _ in range(work.new_tokens):
        logits[:, model.config.eos_token_id] = -torch.inf
        probability, candidates = logits.softmax(dim=-1).topk(k)
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            part.batch_repeat_interleave(k)
        outputs = model(
            encoder_outputs=(repeated,), decoder_input_ids=candidates.view(-1, 1), past_key_values=cache, **step
        )
        tried = outputs.decoder_hidden_states[-1][:, -1].view(work.rows, k, -1)
        cosines = nn.functional.normalize(tried, dim=-1) @ nn.functional.normalize(states, dim=-1).transpose(1, 2)
        choice = (0.4 * probability - 0.6 * cosines.amax(dim=-1)).argmax(dim=-1)
        rows = torch.arange(work.rows) * k + choice
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            part.batch_select_indices(rows)
        logits = outputs.logits[rows, -1]
        states = torch.cat((states, tried[torch.arange(work.rows), choice][:, None]), dim=1)
        ids = torch.cat((ids, candidates[torch.arange(work.rows), choice][:, None]), dim=1)
    return ids


def theirs(model, batch: dict[str, torch.Tensor], work: Work) -> torch.Tensor:
    return naive_contrastive(model, batch, work) if work.candidates else model.generate(**batch, **work.arguments())


def ours(model, batch: dict[str, torch.Tensor], work: Work) -> torch.Tensor:
    search = {"penalty_alpha": 0.6, "top_k": work.candidates} if work.candidates else {}
    return model.generate(**batch, **work.arguments(), **search)


def bare_products(model: DragomanForConditionalGeneration, work: Work, packed: bool) -> Callable[[], None]:
    """
    The products with the weights that this decoding cannot do without, attention's own left out: one after another as
    the host computes them, or with packed weights.
    """

    def products(layers: list[nn.Linear], rows: int):
        inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}
        calls = [side_by_side([layer], pack=True) if packed else layer for layer in layers]
        return lambda: [call(inputs[layer.in_features]) for call, layer in zip(calls, layers, strict=True)]

    stacks: dict[str, list] = {"encoder": [], "source": [], "step": [model.lm_head]}
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            of_source = re.search(r"cross_attn\.[kv]_proj", name)
            stacks["encoder" if name.startswith("encoder.") else "source" if of_source else "step"].append(module)

    @torch.no_grad()
    def run():
        once()
        for _ in range(work.new_tokens):
            step()

    once = products(stacks["encoder"] + stacks["source"], work.rows * work.source_length)
    step = products(stacks["step"], work.rows * max(work.beams, work.candidates))
    return run


def cross_bytes(model, batch: dict[str, torch.Tensor], beams: int) -> int:
    found = model.generate(**batch, num_beams=beams, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    layers = found.past_key_values.cross_attention_cache.layers
    return sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))


def agreement(found: list[torch.Tensor]) -> str:
    equal = int((found[0] == found[1]).all(dim=1).sum()) if found[0].shape == found[1].shape else 0
    return f"{equal} of {len(found[0])}"


def peak_memory(folder: Path, side: str, row: str, sizes: dict[str, Any]) -> float:
    """MB that the decoding of one side adds to a fresh process that holds the model."""
    command = [sys.executable, __file__, "--memory-of", f"{folder}:{side}", "--row", row]
    command += [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(folder: str, side: str, work: Work, vocab_size: int):
    """Prints the MB for `peak_memory`."""
    model, batch = read_model(Path(folder)), batch_of(work, vocab_size)

    short = Work(1, 4, 2, work.beams)
    model.generate(**batch_of(short, vocab_size), **short.arguments())  # what is allocated once
    used = memory_from_now()
    (ours if side == "ours" else theirs)(model, batch, work)
    print(used())


def whole_files(names: list[str], job: Job, model: Path, other: Path | None, scratch: Path) -> list[str]:
    """The rows of `JOBS`, one after another."""
    lines = []
    for name in names:
        folder = scratch / name
        folder.mkdir()
        if name == "job":
            lines += against_stock(job, model, folder)
        elif name == "ctranslate2":
            lines += against_ctranslate2(job, model, folder)
        elif name == "refill":
            lines += idle_places(job, model)
        elif other is not None:
            lines += against_another(job, model, other)
        lines.append("")
    return lines


def show() -> str:
    """The summaries of all records, as one table."""
    texts = [record.read_text(encoding="utf-8") for record in sorted(RESULTS.glob("generation*.md"))]
    parts = [part for text in texts for part in text.split(HEADER)[1:]]
    rows = [line for part in parts for line in part.split("\n\n")[0].splitlines()[2:]]
    return "\n".join(summary(rows)[1:])


def main(
    row: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join([*ROWS, *JOBS])}; repeat for more. All but the last 4.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="marian, bart or t5; repeat for more.")] = None,
    repeats: Annotated[int, typer.Option(help="Turns of every side, after one that does not count.")] = 5,
    d_model: int = 512,
    layers: Annotated[int, typer.Option(help="Of each stack.")] = 6,
    vocab_size: int = 8000,
    new_tokens: Annotated[int | None, typer.Option(help="Instead of the row's.")] = None,
    threads: int = 2,
    memory: Annotated[bool, typer.Option(help="Also peak memory of the row beam-1000.")] = True,
    model: Annotated[Path | None, typer.Option(help=f"Trained model for {', '.join(JOBS)}.")] = None,
    other: Annotated[Path | None, typer.Option(help="The second one of deep_shallow.")] = None,
    data: Annotated[str | None, typer.Option(help="Their test sentences: a file, or embedded:NAME/SPLIT.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many sentences of them.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sentences in a batch of translate() and of the export.")] = 32,
    clock: Annotated[
        str, typer.Option(help="Of those rows: wall, or cpu, the time of the processor, for a busy machine.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    show_records: Annotated[bool, typer.Option("--show", help="Print what was recorded instead.")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if show_records:
        print(show())
        return
    names = row or list(ROWS)
    jobs = [name for name in names if name in JOBS]
    if jobs and (model is None or data is None or ("deep_shallow" in jobs and other is None)):
        raise typer.BadParameter(f"the rows {', '.join(JOBS)} need --model and --data, deep_shallow also --other.")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    chosen = {name: ROWS[name] for name in names if name not in JOBS}
    if new_tokens is not None:
        chosen = {name: Work(**{**vars(work), "new_tokens": new_tokens}) for name, work in chosen.items()}
    if memory_of is not None:
        folder, side = memory_of.rsplit(":", 1)
        measure_memory(folder, side, next(iter(chosen.values())), vocab_size)
        return
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads, fp32."]
    if chosen:
        lines[0] += (
            f" d={d_model}, {layers}+{layers} layers, vocabulary {vocab_size}; milliseconds a step, medians of "
            f"{repeats} turns; ratios with quartiles; every output as long as asked for."
        )
        lines += [
            "",
            "| work | weights of | host | ours | host / ours | host's products | ours | time outside products gone "
            "| equal rows | cross cache MB, host : ours |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    print(*lines, sep="\n", flush=True)
    goals = []
    with tempfile.TemporaryDirectory() as scratch:
        for row_name, work in chosen.items():
            best, what = float("inf"), f"{row_name} {work.rows} x {work.source_length} + {work.new_tokens}"
            for name in peer or PEERS:
                folders = both_sides(Path(scratch), name, d_model, layers, vocab_size)
                host, mine = (read_model(folder) for folder in folders)
                batch = batch_of(work, vocab_size)
                sides = [partial(theirs, host, batch, work), partial(ours, mine, batch, work)]
                bare = [bare_products(mine, work, packed) for packed in (False, True)]
                times, found = take_turns(sides + bare, repeats)
                ms = [1000 * statistics.median(side) / work.new_tokens for side in times]
                ratio, gone = spread(times[0], times[1]), 1 - (ms[1] - ms[3]) / max(ms[0] - ms[2], 1e-9)
                cache = "-"
                if work.beams > 1:
                    kept = [cross_bytes(side, batch, work.beams) / 1e6 for side in (host, mine)]
                    cache = f"{kept[0]:.2f} : {kept[1]:.2f}"
                lines.append(
                    f"| {what} | {name} | {ms[0]:.1f} | {ms[1]:.1f} | {ratio} | {ms[2]:.1f} | {ms[3]:.1f} | {gone:.0%} "
                    f"| {agreement(found)} | {cache} |"
                )
                print(lines[-1], flush=True)
                if ms[0] < best:
                    best = ms[0]
                    fastest = f"| {what}, ms a step ({name}) | {ms[0]:.1f} | {ms[1]:.1f} | {ratio} | >= {work.goal} |"
            goals.append(fastest)
        if memory and "beam-1000" in chosen:
            settings = {"d_model": d_model, "layers": layers, "vocab_size": vocab_size, "threads": threads}
            settings |= {} if new_tokens is None else {"new_tokens": new_tokens}
            for name in peer or PEERS:
                folders = both_sides(Path(scratch), name, d_model, layers, vocab_size)
                used = [
                    peak_memory(folder, side, "beam-1000", settings)
                    for folder, side in zip(folders, ("theirs", "ours"), strict=True)
                ]
                goals.append(
                    f"| peak memory of beam-1000 beyond the model, MB ({name}) | {used[0]:.0f} | {used[1]:.0f} "
                    f"| **{used[1] / used[0]:.2f}** | <= 0.5 |"
                )
        printed = len(lines)
        if chosen:
            lines += summary(goals)
        if model is not None and data is not None:
            job = read_job(data, limit, repeats=repeats, threads=threads, clock=clock, batch_size=batch_size)
            lines += ["", *whole_files(jobs, job, model, other, Path(scratch))]
    print(*lines[printed:], sep="\n", flush=True)
    if output is not None:
        output.write_text("\n".join(["# Decoding\n", *lines]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
