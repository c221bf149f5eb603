"""What training would take on N GPUs, computed from the cost of a training step.

    python scripts/scaling.py
    python scripts/scaling.py --gpu "A100,312,300,25,80" --utilization 0.3

The work of a step is counted (multiplications and additions of the matrix products, forward and backward), and a step
is timed on this machine to see how much of the time these products take. The rest is arithmetic: time on a GPU by its
peak and the share of it that is assumed to be reached, traffic of the gradients by the bandwidths, memory by the
parameters. Nothing here has run on a GPU.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from transformers import AutoModelForSeq2SeqLM

from dragoman import preset


IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# Bytes of a parameter in training: weight, gradient and the two moments of Adam, in single precision; autocast's copy.
BYTES_A_PARAMETER = 4 * 4 + 2


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bfloat16 products in TFLOP/s, GB/s inside a machine and between machines, memory in GB."""

    name: str
    peak: float
    inside: float
    outside: float
    memory: float
    to_a_machine: int = 8


@dataclass(frozen=True)
class Job:
    name: str
    pairs: float
    tokens: int  # of a side of a pair
    passes: float
    model: str
    sizes: dict[str, int]
    batch: int  # real source and target tokens of an update, of all GPUs


JOBS = [
    Job(
        "WMT size", 4.5e6, 28, 20, "base",
        {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 1408, "decoder_ffn_dim": 1408,
         "encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 32_000}, 50_000,
    ),
    Job(
        "a billion pairs", 1e9, 30, 1, "large",
        {"d_model": 1024, "encoder_layers": 24, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
         "encoder_attention_heads": 16, "decoder_attention_heads": 16, "vocab_size": 64_000}, 500_000,
    ),
]  # fmt: skip


def products_a_pair(config, source: int, target: int) -> float:
    """Floating point operations of the matrix products of a pair, forward and backward (twice the forward)."""
    d, inner_encoder, inner_decoder = config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim
    matrices = 3 if config.gated_mlp else 2
    encoder = config.encoder_layers * (4 * d * d + matrices * d * inner_encoder) * source
    encoder += config.encoder_layers * 2 * source * source * d  # scores and sums of attention
    decoder = config.decoder_layers * (6 * d * d + matrices * d * inner_decoder) * target
    decoder += config.decoder_layers * 2 * d * d * source  # keys and values of the source
    decoder += config.decoder_layers * 2 * (target * target + target * source) * d
    return 3 * 2 * (encoder + decoder + config.vocab_size * d * target)


def config_of(sizes: dict[str, int]):
    return preset("modern", **sizes, **IDS)


def rate_of_products(d_model: int, rows: int) -> float:
    """Operations a second of bare products of the sizes of the step below, on this machine."""
    inputs, weight = torch.randn(rows, d_model), torch.randn(d_model, 4 * d_model)
    times = []
    for _ in range(9):
        begin = time.process_time()
        for _ in range(10):
            inputs @ weight
        times.append(time.process_time() - begin)
    return 10 * 2 * rows * d_model * 4 * d_model / statistics.median(times)


def rate_of_training(d_model: int, rows: int, length: int) -> float:
    """Operations of the products a second of training steps, AdamW included, on this machine."""
    sizes = {"d_model": d_model, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8 * d_model // 3,
             "decoder_ffn_dim": 8 * d_model // 3, "encoder_attention_heads": d_model // 64,
             "decoder_attention_heads": d_model // 64, "vocab_size": 8000}  # fmt: skip
    config = config_of(sizes)
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(3, 8000, (rows, length))
    times = []
    for _ in range(6):
        begin = time.process_time()
        model(input_ids=ids, labels=ids, num_items_in_batch=ids.numel()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
    return rows * products_a_pair(config, length, length) / statistics.median(times[1:])


def parameters_of(job: Job) -> int:
    with torch.device("meta"):
        return AutoModelForSeq2SeqLM.from_config(config_of(job.sizes)).num_parameters()


def plan(job: Job, gpu: Gpu, count: int, utilization: float, padding: float) -> dict[str, float]:
    """Hours and shares of a job on so many GPUs with DDP, and the memory of a GPU with it and with FSDP2."""
    parameters = parameters_of(job)
    work = products_a_pair(config_of(job.sizes), job.tokens, job.tokens) / (1 - padding)
    pairs_an_update = job.batch / (2 * job.tokens)
    compute = pairs_an_update * work / count / (gpu.peak * 1e12 * utilization)
    bandwidth = gpu.inside if count <= gpu.to_a_machine else gpu.outside
    # A ring moves 2 (n - 1) / n of the gradients through every link, and DDP hides it behind the backward pass,
    # two thirds of the step.
    traffic = 2 * (count - 1) / count * 4 * parameters / (bandwidth * 1e9)
    step = compute + max(traffic - 2 / 3 * compute, 0)
    updates = job.pairs * job.passes / pairs_an_update
    return {
        "parameters": parameters,
        "updates": updates,
        "seconds": step,
        "hours": updates * step / 3600,
        "lost": 1 - compute / step,
        "ddp": BYTES_A_PARAMETER * parameters / 1e9,
        "fsdp": BYTES_A_PARAMETER * parameters / count / 1e9,
        "tokens": job.batch / count,
    }


def main(
    gpu: Annotated[
        str, typer.Option(help="Name, TFLOP/s, GB/s inside the machine and between machines, GB of memory.")
    ] = "H100,989,450,50,80",
    utilization: Annotated[float, typer.Option(help="Share of the peak that training reaches: assumed.")] = 0.3,
    padding: Annotated[float, typer.Option(help="Share of a batch, as measured by benchmark_training.py.")] = 0.02,
    d_model: Annotated[int, typer.Option(help="Of the step that is timed here.")] = 256,
) -> None:
    torch.set_num_threads(1)
    name, *figures = gpu.split(",")
    chosen = Gpu(name, *map(float, figures))
    bare, training = rate_of_products(d_model, 32 * 28), rate_of_training(d_model, 32, 28)
    print(
        f"On this machine, one thread, d={d_model}: bare products {bare / 1e9:.0f} GFLOP/s, training steps "
        f"{training / 1e9:.0f} GFLOP/s of products, {training / bare:.0%} of that.\n"
    )
    print(
        f"On {name} ({chosen.peak:g} TFLOP/s at a utilization of {utilization:.0%}, {chosen.inside:g} and "
        f"{chosen.outside:g} GB/s, {chosen.memory:g} GB), {padding:.0%} padding:\n"
    )
    print(
        "| job | model | updates | GPUs | tokens a GPU and update | seconds an update | waiting for gradients | hours "
        "| GPU hours | GB for weights and optimizer: DDP | FSDP2 |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for job in JOBS:
        for count in (1, 8, 64):
            found = plan(job, chosen, count, utilization, padding)
            print(
                f"| {job.name} | {job.model}, {found['parameters'] / 1e6:.0f} M | {found['updates']:,.0f} | {count} "
                f"| {found['tokens']:,.0f} | {found['seconds']:.3f} | {found['lost']:.0%} | {found['hours']:,.1f} "
                f"| {count * found['hours']:,.0f} | {found['ddp']:.1f} | {found['fsdp']:.1f} |"
            )


if __name__ == "__main__":
    typer.run(main)
