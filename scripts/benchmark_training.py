"""Training here against HF Marian, BART and T5 of the same size in stock Seq2SeqTrainer.

    python scripts/benchmark_training.py --output scripts/results/training.md
    python scripts/benchmark_training.py --row speed --row step --turns 3
    python scripts/benchmark_training.py --row quality --minutes 20 --seeds 3
    python scripts/benchmark_training.py --row quality --seeds 3 --ours qk_norm=true --goal 55.77

speed    real target tokens per second of processor time, all sides at the same mean number of real target tokens per
         update: ours under a token budget, the peers on random batches and on `group_by_length`
step     forward, loss and backward on one padded batch, as a random batch is
memory   peak of a whole step (AdamW included) at a vocabulary of 64,000, in a process of its own for each side
quality  processor time to the validation chrF that the best peer has after so many minutes of it; learning rate,
         warm-up and initial weights are searched for every side

The sides take turns; a ratio is that of neighbors, and its median and quartiles are printed. The peers get
`accepts_loss_kwargs = False`, without which the Trainer would scale their loss twice.
"""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
import yaml
from datasets import Dataset
from measuring import memory_from_now, spread, take_turns
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from dragoman import preset
from dragoman.data.batching import TokenBudgetBatches
from dragoman.data.collators import Seq2SeqCollator, encode_pairs
from dragoman.data.reading import read_pairs
from dragoman.data.tokenizers import build_tokenizer
from dragoman.evaluation.scores import compute_scores
from dragoman.training.arguments import TrainingArguments
from dragoman.training.batches import side_lengths
from dragoman.training.trainer import BatchingTrainer
from dragoman.training.watching import Samples


PEERS = ("marian", "bart", "t5")
ROWS = ("speed", "step", "memory", "quality")
IDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Sizes:
    """Of every side; what is gated has two thirds of the inner width, so that the parameters are the same in number."""

    d_model: int
    layers: int
    vocab_size: int
    ours: tuple[str, ...] = ()  # key=value, what our model has beyond its preset

    @property
    def heads(self) -> int:
        return max(self.d_model // 64, 2)

    @property
    def gated(self) -> int:
        return round(8 * self.d_model / 3)


def model_of(side: str, sizes: Sizes, seed: int = 0, init_std: float | None = None):
    """Ours or a peer, dropout 0.1, without label smoothing; `init_std` None is the side's own default."""
    torch.manual_seed(seed)
    heads, ffn_dim = sizes.heads, 4 * sizes.d_model
    if side == "ours":
        config = preset(
            "modern", vocab_size=sizes.vocab_size, d_model=sizes.d_model, encoder_layers=sizes.layers,
            decoder_layers=sizes.layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
            encoder_ffn_dim=sizes.gated, decoder_ffn_dim=sizes.gated, label_smoothing=0.0, init_std=init_std, **IDS,
            **{key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in sizes.ours)},
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(config)
    if side == "t5":
        config = transformers.T5Config(
            vocab_size=sizes.vocab_size, d_model=sizes.d_model, d_kv=sizes.d_model // heads, d_ff=sizes.gated,
            num_layers=sizes.layers, num_heads=heads, feed_forward_proj="gated-gelu", dropout_rate=0.1,
            initializer_factor=1.0 if init_std is None else init_std, **IDS,
        )  # fmt: skip
        peer_class = transformers.T5ForConditionalGeneration
    else:
        config_class, peer_class = {
            "marian": (transformers.MarianConfig, transformers.MarianMTModel),
            "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        }[side]
        config = config_class(
            vocab_size=sizes.vocab_size, d_model=sizes.d_model, encoder_layers=sizes.layers,
            decoder_layers=sizes.layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
            encoder_ffn_dim=ffn_dim, decoder_ffn_dim=ffn_dim, max_position_embeddings=256, dropout=0.1,
            init_std=0.02 if init_std is None else init_std, forced_eos_token_id=None,
            **({"scale_embedding": True} if side == "marian" else {}), **IDS,
        )  # fmt: skip
    peer = type(peer_class.__name__, (peer_class,), {"accepts_loss_kwargs": False})(config)
    peer.generation_config.forced_eos_token_id = None
    return peer


@dataclass
class Data:
    encoded: Dataset
    tokenizer: Any
    budget: int
    batch_size: int
    mean_tokens: float  # real target tokens of an update


def read_data(path: Path, pairs: int, longest: int, vocab_size: int, batch_size: int) -> Data:
    rows = read_pairs(str(path))
    rows = rows.shuffle(seed=1).select(range(min(pairs, len(rows))))
    tokenizer = build_tokenizer(rows, kind="bpe", vocab_size=vocab_size)
    limits: dict[str, Any] = {"max_source_length": longest, "max_target_length": longest, "overlong": "drop"}
    encoded, _ = encode_pairs(rows, tokenizer, option_prefix=None, **limits)
    sources, targets = side_lengths(encoded)
    mean_tokens = batch_size * float(targets.mean())
    low, high = int((sources + targets).max()), int((sources + targets).sum())
    while high - low > 1:  # the more tokens a batch may have, the more real ones it has
        middle = (low + high) // 2
        fewer = targets.sum() / len(TokenBudgetBatches(sources, targets, middle)) < mean_tokens
        low, high = (middle, high) if fewer else (low, middle)
    return Data(encoded, tokenizer, high, batch_size, mean_tokens)


def padding_of(batches: list[list[int]], lengths: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of padding of both sides."""
    real = padded = 0
    for batch in batches:
        for side in lengths:
            real, padded = real + int(side[batch].sum()), padded + len(batch) * int(side[batch].max())
    return 1 - real / padded


class Clock(TrainerCallback):
    """Processor time of the steps after the first few."""

    def __init__(self) -> None:
        self.begin = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP_STEPS:
            self.begin = time.process_time()
        self.seconds = time.process_time() - self.begin


class CountingTrainer(Seq2SeqTrainer):
    """The stock trainer; it counts the real target tokens of the steps that are timed."""

    tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= WARM_UP_STEPS:
            self.tokens += int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)


class OurTrainer(CountingTrainer, BatchingTrainer):
    """Ours, counting too."""


def trainer_of(side: str, model: Any, data: Data, folder: Path, sampling: str, **settings: Any) -> CountingTrainer:
    common: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "eval_strategy": "no", "logging_steps": 1_000_000, "learning_rate": 1e-4, "adam_beta2": 0.98,
        "weight_decay": 0.01, **settings,
    }  # fmt: skip
    if side == "ours":
        arguments = TrainingArguments(
            max_tokens_per_batch=data.budget, load_best_model_at_end=False, metric_for_best_model=None, **common
        )
        collator = Seq2SeqCollator(data.tokenizer, model=model)
        return OurTrainer(
            model=model, args=arguments, train_dataset=data.encoded, processing_class=data.tokenizer,
            data_collator=collator, train_collator=collator, shuffle_buffer=1,
            complete_checkpoint=lambda folder, state: None, samples=Samples(data.tokenizer, print, 0),
        )  # fmt: skip
    arguments = Seq2SeqTrainingArguments(
        per_device_train_batch_size=data.batch_size, train_sampling_strategy=sampling, **common
    )
    collator = DataCollatorForSeq2Seq(data.tokenizer, model=model)
    return CountingTrainer(
        model=model, args=arguments, train_dataset=data.encoded, data_collator=collator,
        processing_class=data.tokenizer,
    )  # fmt: skip


def grouped_order(data: Data, sources: np.ndarray, seed: int) -> list[list[int]]:
    """The batches of `train_sampling_strategy="group_by_length"`, all of one epoch."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(seed)
    order = list(LengthGroupedSampler(data.batch_size, lengths=sources.tolist(), generator=generator))
    return [order[begin : begin + data.batch_size] for begin in range(0, len(order), data.batch_size)]


def timed_steps(side: str, sampling: str, model: Any, data: Data, folder: Path, steps: int, seed: int) -> float:
    """Real target tokens per second of processor time, over `steps` updates through the Trainer."""
    if sampling == "group_by_length":  # of its batches any few, in any order: the first ones are the longest
        chosen = grouped_order(data, side_lengths(data.encoded)[0], seed)
        np.random.default_rng(seed).shuffle(chosen)
        rows = data.encoded.select([row for batch in chosen[: steps + WARM_UP_STEPS] for row in batch])
        data = Data(rows, data.tokenizer, data.budget, data.batch_size, data.mean_tokens)
        sampling = "sequential"
    clock = Clock()
    trainer = trainer_of(side, model, data, folder, sampling, max_steps=steps + WARM_UP_STEPS, seed=seed)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.tokens / clock.seconds


def speed_rows(sizes: Sizes, data: Data, steps: int, turns: int) -> Iterator[str]:
    lengths = side_lengths(data.encoded)
    order = np.random.default_rng(0).permutation(len(data.encoded)).tolist()
    batches = {
        "token budget": TokenBudgetBatches(*lengths, data.budget).shuffled(0, 0),
        "random": [order[begin : begin + data.batch_size] for begin in range(0, len(order), data.batch_size)],
        "group_by_length": grouped_order(data, lengths[0], 0),
    }
    models = {side: model_of(side, sizes) for side in ("ours", *PEERS)}
    works = {"ours, token budget": ("ours", "token budget")}
    works |= {f"{peer}, {sampling}": (peer, sampling) for sampling in list(batches)[1:] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: lambda turn, side=side, sampling=sampling: timed_steps(
                side, sampling, models[side], data, Path(folder), steps, turn
            )
            for name, (side, sampling) in works.items()
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name in reversed(sides) if turn % 2 else sides:
                found[name].append(sides[name](turn))
    yield (
        f"\n## Real target tokens per second of processor time\n\n{len(data.encoded):,} pairs of at most "
        f"{lengths[0].max()} and {lengths[1].max()} tokens; {data.mean_tokens:.0f} real target tokens an update on "
        f"average ({data.batch_size} pairs; {data.budget} tokens); {turns} turns of {steps} updates.\n\n"
        "| side | parameters | target tokens an update | padding, both sides | real target tokens/s | ours / peer |\n"
        "|---|--:|--:|--:|--:|--:|"
    )
    ours = found["ours, token budget"]
    for name, (side, sampling) in works.items():
        ratio = "" if side == "ours" else spread(ours, found[name])
        parameters, tokens = models[side].num_parameters(only_trainable=True), lengths[1].sum()
        yield (
            f"| {name} | {parameters:,} | {tokens / len(batches[sampling]):.0f} "
            f"| {padding_of(batches[sampling], lengths):.1%} | {statistics.median(found[name]):.0f} | {ratio} |"
        )
    for sampling in list(batches)[1:]:
        best = max(PEERS, key=lambda peer: statistics.median(found[f"{peer}, {sampling}"]))
        ratio = spread(ours, found[f"{best}, {sampling}"])
        yield f"\nAgainst the fastest peer on {sampling} ({best}): {ratio}."


def loss_of(side: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the Trainer calls each."""
    count = {"num_items_in_batch": (batch["labels"] != -100).sum()} if side == "ours" else {}
    return model(**batch, **count).loss


def step_rows(sizes: Sizes, data: Data, turns: int) -> Iterator[str]:
    models = {side: model_of(side, sizes).train() for side in ("ours", *PEERS)}
    order = np.random.default_rng(3).permutation(len(data.encoded))[: data.batch_size].tolist()
    rows = [data.encoded[number] for number in order]
    batches = {side: DataCollatorForSeq2Seq(data.tokenizer, model=model)(rows) for side, model in models.items()}

    def step(side: str) -> None:
        models[side].zero_grad()
        loss_of(side, models[side], batches[side]).backward()

    times, _ = take_turns([partial(step, side) for side in models], turns, time.process_time)
    found = dict(zip(models, times, strict=True))
    labels, inputs = batches["ours"]["labels"], batches["ours"]["input_ids"]
    real = (int((labels != -100).sum()) + int(batches["ours"]["attention_mask"].sum())) / (
        labels.numel() + inputs.numel()
    )
    yield (
        f"\n## Bare step\n\nForward, loss and backward on one padded batch of {tuple(inputs.shape)} source and "
        f"{tuple(labels.shape)} target tokens, {1 - real:.0%} of them padding; {turns} turns.\n\n"
        "| side | ms of processor time | peer / ours |\n|---|--:|--:|"
    )
    for side, seconds in found.items():
        ratio = "" if side == "ours" else spread(seconds, found["ours"])
        yield f"| {side} | {1000 * statistics.median(seconds):.0f} | {ratio} |"
    best = min(PEERS, key=lambda peer: statistics.median(found[peer]))
    ratio = spread(found[best], found["ours"])
    yield f"\nAgainst the fastest peer ({best}): {ratio}."


MEMORY_SIZES = Sizes(d_model=256, layers=2, vocab_size=64_000)
MEMORY_BATCH = (32, 48)


def measure_memory(side: str, ours: tuple[str, ...]) -> None:
    """Prints the MB that a step adds to a process that holds the model."""
    model = model_of(side, replace(MEMORY_SIZES, ours=ours)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(3, MEMORY_SIZES.vocab_size, MEMORY_BATCH)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    small = {name: part[:1, :2] for name, part in batch.items()}
    with torch.no_grad():
        loss_of(side, model, small)  # what is allocated once

    used = memory_from_now()
    loss_of(side, model, batch).backward()
    backward = used()
    optimizer.step()
    print(backward, used(), model.num_parameters(only_trainable=True))


def memory_rows(options: tuple[str, ...]) -> Iterator[str]:
    rows, length = MEMORY_BATCH
    yield (
        f"\n## Peak memory of a step at a vocabulary of {MEMORY_SIZES.vocab_size:,}\n\nBeyond the loaded model; batch "
        f"of {rows} x {length} source and as many target tokens, d={MEMORY_SIZES.d_model}, {MEMORY_SIZES.layers}+"
        f"{MEMORY_SIZES.layers} layers; a process for each side.\n\n"
        "| side | parameters | MB, forward and backward | MB, with AdamW | ours / peer |\n|---|--:|--:|--:|--:|"
    )
    ours = 0.0
    for side in ("ours", *PEERS):
        command = [sys.executable, __file__, "--memory-of", side, *(f"--ours={option}" for option in options)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
        backward, whole, parameters = float(printed[0]), float(printed[1]), int(printed[2])
        ours = ours or whole
        ratio = "" if side == "ours" else f"**{ours / whole:.2f}**"
        yield f"| {side} | {parameters:,} | {backward:.0f} | {whole:.0f} | {ratio} |"


@dataclass(frozen=True)
class Recipe:
    """What is searched; `init_std` None is the side's default."""

    learning_rate: float
    warmup_steps: int
    init_std: float | None = None


RATES = (5e-4, 1e-3, 2e-3)  # where the search begins
LOWEST_RATE, HIGHEST_RATE = 6e-5, 2e-2
LONG_WARM_UP, SHORT_WARM_UP = 400, 100


def untried_neighbors(best: Recipe, tried: Collection[Recipe]) -> tuple[float, ...]:
    """Half and double the rate of the best recipe, where they are missing."""
    rates = (best.learning_rate / 2, best.learning_rate * 2)
    return tuple(
        rate for rate in rates if LOWEST_RATE <= rate <= HIGHEST_RATE and replace(best, learning_rate=rate) not in tried
    )


@dataclass(frozen=True)
class Run:
    """One training of one side, for at most so many seconds of processor time, scored every `every` of them."""

    side: str
    recipe: Recipe
    seed: int
    seconds: float
    every: float
    until: float = math.inf  # ends at this chrF


class Validation:
    """Scores a model in training on pairs that it does not train on."""

    def __init__(self, pairs: list[dict[str, str]], tokenizer: Any) -> None:
        self.pairs, self.tokenizer = pairs, tokenizer

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Cross-entropy of a target token."""
        collator = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        summed = tokens = 0.0
        for begin in range(0, len(self.pairs), 50):
            texts = self.pairs[begin : begin + 50]
            encoded = self.tokenizer(
                [pair["source"] for pair in texts], text_target=[pair["target"] for pair in texts],
                truncation=True, max_length=128,
            )  # fmt: skip
            batch = collator([dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)])
            count = int((batch["labels"] != -100).sum())
            summed, tokens = summed + count * float(model(**batch).loss), tokens + count
        return summed / tokens

    @torch.no_grad()
    def chrf(self, model: Any) -> float:
        """Of greedy translations of at most 80 tokens."""
        texts = []
        for begin in range(0, len(self.pairs), 50):
            sources = [pair["source"] for pair in self.pairs[begin : begin + 50]]
            batch = self.tokenizer(sources, padding=True, truncation=True, max_length=128, return_tensors="pt")
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=80, num_beams=1,
                do_sample=False,
            )  # fmt: skip
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return compute_scores(texts, [pair["target"] for pair in self.pairs], ["chrf"])["chrf"]["chrf"]


class Learning(TrainerCallback):
    """Keeps the curve of (seconds, chrF) and ends the run; the time of scoring does not count."""

    def __init__(self, run: Run, validation: Validation) -> None:
        self.run, self.validation = run, validation
        self.curve: list[tuple[float, float]] = []
        self.spent, self.since = 0.0, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent += time.process_time() - self.since
        if self.spent >= self.run.every * (len(self.curve) + 1):
            model = kwargs["model"].eval()
            self.curve.append((self.spent, self.validation.chrf(model)))
            model.train()
        reached = bool(self.curve) and self.curve[-1][1] >= self.run.until
        control.should_training_stop = reached or self.spent >= self.run.seconds
        self.since = time.process_time()


def learn(run: Run, sizes: Sizes, data: Data, validation: Validation) -> tuple[list[tuple[float, float]], float]:
    """The curve of (seconds, chrF) and the validation loss at the end.

    The rate falls as 1 / sqrt(step), so that no length has to be known.
    """
    transformers.logging.set_verbosity_error()  # a process of its own
    model = model_of(run.side, sizes, run.seed, run.recipe.init_std)
    learning = Learning(run, validation)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            run.side, model, data, Path(folder), "group_by_length", max_steps=1_000_000, seed=run.seed,
            learning_rate=run.recipe.learning_rate, warmup_steps=run.recipe.warmup_steps,
            lr_scheduler_type="inverse_sqrt",
        )  # fmt: skip
        trainer.add_callback(learning)
        trainer.remove_callback(PrinterCallback)
        learning.since = time.process_time()
        trainer.train()
    return learning.curve, validation.loss(model.eval())


def quality_rows(
    sizes: Sizes,
    data: Data,
    validation: Validation,
    minutes: float,
    search_minutes: float,
    seeds: int,
    jobs: int,
    goal: float | None,
) -> Iterator[str]:
    sides = ("ours", *PEERS) if goal is None else ("ours",)
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    ) as pool:

        def trained(runs: list[Run]) -> Iterator[tuple[Run, list[tuple[float, float]], float]]:
            outcomes = pool.map(learn, runs, *map(itertools.repeat, (sizes, data, validation)))
            return ((run, *outcome) for run, outcome in zip(runs, outcomes, strict=True))

        losses: dict[str, dict[Recipe, float]] = {side: {} for side in sides}

        def best(side: str) -> Recipe:
            return min(losses[side], key=losses[side].__getitem__)

        def search(tried: list[tuple[str, Recipe]]) -> Iterator[str]:
            for run, _, loss in trained([Run(*pair, 0, 60 * search_minutes, math.inf) for pair in tried]):
                losses[run.side][run.recipe] = math.inf if math.isnan(loss) else loss
                init = "default" if run.recipe.init_std is None else f"{run.recipe.init_std:.3f}"
                yield f"| {run.side} | {run.recipe.learning_rate:g} | {run.recipe.warmup_steps} | {init} | {loss:.3f} |"

        unscaled = [side for side in sides if side in ("marian", "bart")]
        of_peers = ", and for Marian and BART, whose initial weights do not scale with the width, weights that do"
        yield (
            f"\n## Time to quality\n\nMinutes are those of the processor, without scoring; {len(validation.pairs)} "
            f"validation sentences. Search: {search_minutes:g} minutes for each recipe, one seed. Rates are halved or "
            "doubled until the best one lies between two that are worse; then, at that rate, a shorter warm-up"
            f"{of_peers if unscaled else ''}.\n\n"
            "| side | learning rate | warm-up | initial std | validation loss |\n|---|--:|--:|---|--:|"
        )
        rates = dict.fromkeys(sides, RATES)
        while any(rates.values()):
            yield from search([(side, Recipe(rate, LONG_WARM_UP)) for side in sides for rate in rates[side]])
            rates = {side: untried_neighbors(best(side), losses[side]) for side in sides}
        yield from search([(side, replace(best(side), warmup_steps=SHORT_WARM_UP)) for side in sides])
        yield from search([(side, replace(best(side), init_std=sizes.d_model**-0.5)) for side in unscaled])

        quarter, whole = 15 * minutes, 60 * minutes
        curves: dict[str, list[list[tuple[float, float]]]] = {side: [] for side in PEERS}

        def train_peers(peers: dict[str, int]) -> None:
            """Trains so many seeds of each, less those that have been trained."""
            runs = [
                Run(side, best(side), seed, whole, quarter)
                for side, count in peers.items()
                for seed in range(len(curves[side]) + 1, count + 1)
            ]
            for run, curve, _ in trained(runs):
                curves[run.side].append(curve)

        if goal is None:
            promising = min(PEERS, key=lambda side: losses[side][best(side)])
            train_peers({side: seeds if side == promising else 1 for side in PEERS})
            peer = max(PEERS, key=lambda side: curves[side][0][-1][1])
            train_peers({peer: seeds})
            goal = statistics.median(curve[-1][1] for curve in curves[peer])
            yield (
                f"\nThe best recipe of each, and chrF after so many minutes; the best peer, {peer}, has {goal:.2f} at "
                f"the end, the median of its seeds:\n\n| side | seed | "
                + " | ".join(f"{minutes * part / 4:g}" for part in range(1, 5))
                + " |\n|---|--:|--:|--:|--:|--:|"
            )
            for side, of_seeds in curves.items():
                for seed, curve in enumerate(of_seeds, start=1):
                    yield f"| {side} | {seed} | " + " | ".join(f"{score:.2f}" for _, score in curve) + " |"
        else:
            yield f"\nThe best peer had a chrF of {goal:.2f} after {minutes:g} minutes in an earlier run."
        times = []
        yield f"\n| ours, seed | minutes to {goal:.2f} | chrF then |\n|--:|--:|--:|"
        ours = [Run("ours", best("ours"), seed, whole, whole / 80, until=goal) for seed in range(1, seeds + 1)]
        for run, curve, _ in trained(ours):
            seconds, score = curve[-1]
            times.append(seconds / 60 if score >= goal else math.inf)
            yield f"| {run.seed} | {seconds / 60:.1f}{'' if score >= goal else ', not reached'} | {score:.2f} |"
    yield (
        f"\nOurs has what the best peer has after {minutes:g} minutes, median of {seeds} seeds, in "
        f"**{statistics.median(times) / minutes:.2f}** of its time."
    )


def main(
    row: Annotated[list[str] | None, typer.Option(help="speed, step, memory, quality; repeat for more.")] = None,
    data: Annotated[Path, typer.Option(help="Training pairs.")] = Path("data/ddtp_en_it/train.jsonl.gz"),
    validation: Annotated[Path, typer.Option(help="For quality.")] = Path("data/ddtp_en_it/validation.jsonl.gz"),
    pairs: Annotated[int, typer.Option(help="Of the training pairs.")] = 20_000,
    longest: Annotated[int, typer.Option(help="Tokens; longer pairs are left out.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Pairs of an update of the peers.")] = 32,
    d_model: int = 256,
    layers: Annotated[int, typer.Option(help="Of each stack.")] = 3,
    vocab_size: int = 8000,
    steps: Annotated[int, typer.Option(help="Timed updates of a turn, for speed.")] = 8,
    turns: int = 5,
    minutes: Annotated[float, typer.Option(help="Of each training, for quality.")] = 20,
    search_minutes: Annotated[float, typer.Option(help="Of each recipe of its search.")] = 5,
    seeds: Annotated[int, typer.Option(help="For quality.")] = 3,
    sentences: Annotated[int, typer.Option(help="Validation sentences, for quality.")] = 500,
    ours: Annotated[list[str] | None, typer.Option(help="key=value of our model; repeat for more.")] = None,
    goal: Annotated[
        float | None, typer.Option(help="For quality: chrF of the best peer in an earlier run; none is trained now.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at once, for quality: processes of `threads` each.")] = 1,
    threads: int = 1,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    options = tuple(ours or ())
    for option in options:
        if "=" not in option:
            raise typer.BadParameter(f"{option!r} is not key=value", param_hint="--ours")
    if memory_of is not None:
        measure_memory(memory_of, options)
        return
    chosen = row or list(ROWS[:3])
    for name in chosen:
        if name not in ROWS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(ROWS)}", param_hint="--row")
    sizes = Sizes(d_model, layers, vocab_size, options)
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, fp32, {threads} threads; d={d_model}, "
        f"{layers}+{layers} layers, vocabulary {vocab_size}, dropout 0.1, AdamW.",
        f"`python scripts/benchmark_training.py {' '.join(sys.argv[1:])}`",
    ]
    print(*lines, sep="\n", flush=True)
    made: list[Iterator[str]] = []
    if set(chosen) != {"memory"}:
        read = read_data(data, pairs, longest, vocab_size, batch_size)
        if "speed" in chosen:
            made.append(speed_rows(sizes, read, steps, turns))
        if "step" in chosen:
            made.append(step_rows(sizes, read, 2 * turns))
    if "memory" in chosen:
        made.append(memory_rows(options))
    if "quality" in chosen:
        pairs_of_validation = [dict(pair) for pair in read_pairs(str(validation)).select(range(sentences))]
        scored = Validation(pairs_of_validation, read.tokenizer)
        made.append(quality_rows(sizes, read, scored, minutes, search_minutes, seeds, jobs, goal))
    for line in itertools.chain(*made):
        lines.append(line)
        print(line, flush=True)
    if output is not None:
        output.write_text("\n".join(["# Training\n", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
