"""The history of encoder-decoders on real data: train every system alike, score it, and write tables and plots.

    python scripts/scoreboard.py peaks cmudict --minutes 0.4
    python scripts/scoreboard.py systems cmudict --minutes 1 --seeds 3
    python scripts/scoreboard.py ablations cmudict --minutes 1
    python scripts/scoreboard.py steps cmudict
    python scripts/scoreboard.py words runs/g2p_cmudict
    python scripts/scoreboard.py report

All systems get the same data, tokenizer, batch size, number of parameters (within 10 %) and training time. Time is that
of the wall clock, or with `--clock cpu` the processor time of this process, which is fairer where other programs share
the machine (use one thread then: OMP_NUM_THREADS=1). The learning rate follows the share of the time that is used: up
for 5 %, then linear to zero; its peak is the best that `peaks` found for the task, or else that of `SYSTEMS`.

Results go to scripts/results/*.json after every system; what is there already with the same settings is not run again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from scoreboard_report import write_report
from scoreboard_systems import ABLATIONS, BLIND_SOURCE, EDM_VARIANTS, ROOT, SYSTEMS, TASKS, Task, build, fit
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Seq2SeqTrainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from dragoman.data.batching import map_in_batches
from dragoman.data.collators import Seq2SeqCollator, encode_pairs
from dragoman.data.reading import read_pairs
from dragoman.data.tokenizers import build_tokenizer
from dragoman.evaluation import compute_scores, evaluate_model, headline
from dragoman.inference.translate import translate
from dragoman.models.attention import ScaledQuery
from dragoman.training.arguments import TrainingArguments
from dragoman.training.trainer import ScheduledSamplingTrainer


RESULTS = ROOT / "scripts" / "results"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WARMUP = 0.05  # of the training time
PEAKS = (1e-3, 2e-3, 4e-3)  # learning rates that `peaks` tries


@dataclass
class Budget(TrainerCallback):
    """Stops the training when its time (or its number of updates) is used up, and says what share of it is."""

    clock: Callable[[], float]
    minutes: float
    updates: int | None = None
    losses: list[float] = field(default_factory=list)
    start: float = 0.0
    step: int = 0

    @property
    def share(self) -> float:
        if self.updates is not None:
            return self.step / self.updates
        return (self.clock() - self.start) / (60 * self.minutes)

    def learning_rate_factor(self, _step: int = 0) -> float:
        share = min(self.share, 1.0)
        return min(share / WARMUP, (1 - share) / (1 - WARMUP))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        control.should_training_stop = self.share >= 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Board:
    """The data of a task, ready for training, decoding and scoring."""

    def __init__(self, task: Task, test_size: int, split: str = "test"):
        self.task = task
        pairs = {name: read_pairs(task.data.format(split=name)) for name in ("train", split)}
        self.tokenizer: Any = build_tokenizer(pairs["train"], joint=True, **task.tokenizer)
        limits = {"max_source_length": task.max_length, "max_target_length": task.max_length}
        self.train, report = encode_pairs(pairs["train"], self.tokenizer, overlong="drop", **limits)
        print(f"training pairs: {report}; vocabulary: {len(self.tokenizer)}")
        test = pairs[split].shuffle(seed=0).select(range(min(test_size, len(pairs[split]))))
        self.sources, self.references = list(test["source"]), references(test)
        self.test, _ = encode_pairs(test.select_columns(["source", "target"]), self.tokenizer)

    def rows(self, config: PreTrainedConfig, dataset: Dataset) -> Dataset:
        """Encoded pairs; for a decoder-only model one row `source </s> <s> target </s>`, with labels on the target."""
        if not isinstance(config, LlamaConfig):
            return dataset

        def joined(row: dict[str, Any]) -> dict[str, Any]:
            prompt = [*row["input_ids"], config.bos_token_id]
            ids = prompt + row["labels"]
            return {"input_ids": ids, "labels": [-100] * len(prompt) + row["labels"], "length": len(ids)}

        return dataset.map(joined)

    def collator(self, model: PreTrainedModel) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        if not isinstance(model.config, LlamaConfig):
            return Seq2SeqCollator(self.tokenizer, model=model)
        pad = DataCollatorForSeq2Seq(self.tokenizer)
        return lambda rows: pad([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

    def decode(self, model: PreTrainedModel, sources: Sequence[str], num_beams: int) -> list[str]:
        settings = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": self.task.max_new_tokens}
        if not isinstance(model.config, LlamaConfig):
            outputs = translate(model, self.tokenizer, sources, batch_size=64, scores=False, **settings)
            return [best.text for best, *_ in outputs]
        config: Any = model.config
        prompts = [[*ids, config.bos_token_id] for ids in self.tokenizer(list(sources)).input_ids]

        def decode_batch(batch: list[list[int]]) -> list[str]:
            longest = max(map(len, batch))
            rows = [[config.pad_token_id] * (longest - len(ids)) + ids for ids in batch]
            input_ids = torch.tensor(rows)
            mask = (input_ids != config.pad_token_id).long()
            with torch.no_grad():
                found: Any = model.eval().generate(input_ids=input_ids, attention_mask=mask, **settings)
            return self.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)

        return list(map_in_batches(prompts, decode_batch, length=len, batch_size=64))

    def scores(self, outputs: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, float]:
        """BLEU and chrF, or phoneme and word error rate in %; `rows` chooses some of the test set."""
        rows = range(len(outputs)) if rows is None else rows
        found = headline(
            compute_scores([outputs[r] for r in rows], [self.references[r] for r in rows], self.task.metrics)
        )
        if "wer" in found:
            return {"WER": 100 * found["sequence_error_rate"], "PER": 100 * found["wer"]}
        return {"BLEU": found["bleu"], "chrF": found["chrf"]}

    def scores_by_length(self, outputs: Sequence[str]) -> list[dict[str, float]]:
        """One entry per bucket: the longest and the mean source length, the number of sources, the scores."""
        lengths = [len(source.split()) for source in self.sources]
        found, shortest = [], 0
        for longest in self.task.buckets:
            rows = [r for r, length in enumerate(lengths) if shortest < length <= longest]
            if rows:
                mean = statistics.mean(lengths[r] for r in rows)
                found.append({"longest": longest, "mean": mean, "rows": len(rows), **self.scores(outputs, rows)})
            shortest = longest
        return found


def references(pairs: Dataset) -> list[list[str]]:
    """What counts as right for each row: the target and, where the data lists them, its variants."""
    variants = pairs["variants"] if "variants" in pairs.column_names else [None] * len(pairs)
    return [[target, *(more or [])] for target, more in zip(pairs["target"], variants, strict=True)]


def train(
    board: Board,
    model: PreTrainedModel,
    peak: float,
    budget: Budget,
    *,
    seed: int,
    dataset: Dataset | None = None,
    change_batch: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
    schedule: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train with the stock trainer until the budget is used up; `schedule` is one of scheduled sampling."""
    collate, tokens = board.collator(model), 0

    def counting(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal tokens
        batch = collate(rows)
        tokens += int((batch["labels"] != -100).sum())
        return change_batch(batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, seed=seed, max_steps=budget.updates or 10**6, report_to="none",
            eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
            per_device_train_batch_size=board.task.batch_size, train_sampling_strategy="group_by_length", use_cpu=True,
            max_grad_norm=1.0, logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer_class: Any = Seq2SeqTrainer
        if schedule is not None:
            trainer_class = partial(
                ScheduledSamplingTrainer, schedule=schedule, train_collator=counting, shuffle_buffer=1,
                complete_checkpoint=lambda folder, state: None,  # none is saved
            )  # fmt: skip
        trainer = trainer_class(
            model=model, args=arguments, data_collator=counting, callbacks=[budget],
            train_dataset=board.rows(model.config, board.train if dataset is None else dataset),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, budget.learning_rate_factor)),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    last = budget.losses[-max(1, len(budget.losses) // 10) :]
    used = budget.clock() - budget.start
    return {
        "updates": budget.step, "wall_minutes": wall / 60, "cpu_minutes": cpu / 60, "tokens_per_second": tokens / used,
        "final_training_loss": statistics.mean(last),
    }  # fmt: skip


@torch.no_grad()
def forced(board: Board, model: PreTrainedModel) -> dict[str, float]:
    """On the test set with the true prefix at every step: loss a token, and wrong tokens in %."""
    collate, loss, wrong, count = board.collator(model), 0.0, 0, 0
    rows = board.rows(model.config, board.test)
    for start in range(0, len(rows), 64):
        batch = collate([rows[row] for row in range(start, min(start + 64, len(rows)))])
        outputs = model.eval()(**batch)
        best, labels = outputs.logits.argmax(-1), batch["labels"]
        if isinstance(model.config, LlamaConfig):  # whose labels stand where their tokens are read
            best, labels = best[:, :-1], labels[:, 1:]
        real = labels != -100
        loss += float(outputs.loss) * int(real.sum())
        wrong += int((best != labels)[real].sum())
        count += int(real.sum())
    return {"forced_loss": loss / count, "forced_errors": 100 * wrong / count}


class Store:
    """A JSON file of results: the settings they share, and one entry a run, written after each."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.is_file():
            before = json.loads(path.read_text())
            if before["settings"] != settings:
                raise ValueError(f"{path} holds results of other settings: {before['settings']}; move it away first")
            self.content = before

    def __contains__(self, name: str) -> bool:
        return name in self.content["runs"]

    def __setitem__(self, name: str, result: dict[str, Any]) -> None:
        load = round(os.getloadavg()[1], 2)
        self.content["runs"][name] = rounded({**result, "load_5_minutes": load, "ended": time.strftime("%F %R")})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
TaskName = Annotated[str, typer.Argument(help=f"{', '.join(TASKS)}.")]
Minutes = Annotated[float, typer.Option(help="Training time of each.")]
TestSize = Annotated[int, typer.Option(help="Pairs of the test set, drawn once.")]
Updates = Annotated[int | None, typer.Option(help="Instead of minutes.")]
Names = Annotated[list[str] | None, typer.Option(help="Not all, but those of these names.")]
ClockName = Annotated[str, typer.Option(help="wall, or cpu: processor time of this process.")]
Folder = Annotated[Path, typer.Option(help="Of the results.")]


@app.command()
def peaks(
    task: TaskName, minutes: Minutes = 0.4,
    peak: Annotated[list[float] | None, typer.Option(help="Learning rates to try.")] = None,
    test_size: Annotated[int, typer.Option(help="Pairs of the validation set, drawn once.")] = 1000,
    updates: Updates = None, clock: ClockName = "wall", folder: Folder = RESULTS, only: Names = None,
) -> None:  # fmt: skip
    """Train every system with several peaks of the learning rate; loss and greedy scores on the validation set."""
    settings = {"task": task, "minutes": minutes, "updates": updates, "test_size": test_size, "clock": clock,
                "threads": torch.get_num_threads()}  # fmt: skip
    store = Store(folder / f"peaks_{task}.json", settings)
    board = Board(TASKS[task], test_size, split="validation")
    for name in only or SYSTEMS:
        for rate in peak or PEAKS:
            if f"{name}/{rate:g}" in store:
                continue
            config, _ = fit(SYSTEMS[name].config, len(board.tokenizer), TASKS[task].parameters)
            set_seed(1)
            model = build(config)
            result = train(board, model, rate, Budget(CLOCKS[clock], minutes, updates), seed=1)
            result |= forced(board, model)
            result |= {"label": SYSTEMS[name].label, "peak": rate,
                       "scores": board.scores(board.decode(model, board.sources, num_beams=1))}  # fmt: skip
            store[f"{name}/{rate:g}"] = result
            print(f"{name}, peak {rate:g}: loss {result['forced_loss']:.3f}, {result['scores']}")


def searched_peak(folder: Path, task: TaskName, name: str) -> float | None:
    """The learning rate with the lowest loss among those that `peaks` tried for this system, if it did."""
    path = folder / f"peaks_{task}.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    tried = [run for key, run in runs.items() if key.split("/")[0] == name]
    return min(tried, key=lambda run: run["forced_loss"])["peak"] if tried else None


@app.command()
def systems(
    task: TaskName, minutes: Minutes = 1.0, seeds: Annotated[int, typer.Option(help="Runs of each.")] = 1,
    test_size: TestSize = 2000, clock: ClockName = "wall", num_beams: int = 4, folder: Folder = RESULTS,
    updates: Updates = None, only: Names = None,
) -> None:  # fmt: skip
    """Train and score every system; quality, by source length too, and what training and decoding cost."""
    settings = {"task": task, "minutes": minutes, "updates": updates, "test_size": test_size, "clock": clock,
                "num_beams": num_beams, "threads": torch.get_num_threads()}  # fmt: skip
    store, board = Store(folder / f"systems_{task}.json", settings), Board(TASKS[task], test_size)
    chosen = {name: (SYSTEMS | EDM_VARIANTS)[name] for name in only or SYSTEMS}
    for seed in range(1, seeds + 1):
        for name, system in chosen.items():
            if f"{name}/{seed}" in store:
                continue
            config, parameters = fit(system.config, len(board.tokenizer), TASKS[task].parameters, system.recurrence)
            set_seed(seed)
            model = build(config, system.recurrence)
            budget = Budget(CLOCKS[clock], minutes, updates)
            peak = searched_peak(folder, task, name) or system.peak
            result = train(board, model, peak, budget, seed=seed)
            start = CLOCKS[clock]()
            outputs = board.decode(model, board.sources, num_beams)
            result |= {"label": system.label, "parameters": parameters, "width": config.hidden_size,
                       "peak": peak, "sentences_per_second": len(outputs) / (CLOCKS[clock]() - start),
                       "scores": board.scores(outputs), "by_length": board.scores_by_length(outputs)}  # fmt: skip
            store[f"{name}/{seed}"] = result
            print(f"{name}, seed {seed}: {parameters:,} parameters, {result['updates']} updates, {result['scores']}")


@app.command()
def steps(
    task: TaskName, longest: int = 256, batch_size: int = 16, repeats: int = 3, clock: ClockName = "wall",
    folder: Folder = RESULTS,
) -> None:  # fmt: skip
    """Time of forward, loss and backward pass for 8, 16, ... tokens on each side (decoder-only: twice as many)."""
    settings = {"task": task, "batch_size": batch_size, "clock": clock, "threads": torch.get_num_threads()}
    store = Store(folder / f"steps_{task}.json", settings)
    vocab_size = 100 if task == "cmudict" else TASKS[task].tokenizer["vocab_size"]
    for name, system in SYSTEMS.items():
        if name in store:
            continue
        config, parameters = fit(system.config, vocab_size, TASKS[task].parameters)
        set_seed(0)
        model = build(config).train()
        milliseconds = {}
        for length in (8 * 2**power for power in range(int(math.log2(longest / 8)) + 1)):
            ids = torch.randint(4, vocab_size, (2, batch_size, length))
            batch = {"input_ids": ids[0], "labels": ids[1]}
            if name == "decoder_only":
                hidden = torch.full_like(ids[0], -100)
                batch = {"input_ids": torch.cat((*ids,), dim=1), "labels": torch.cat((hidden, ids[1]), dim=1)}
            times = []
            for _ in range(repeats + 1):
                start = CLOCKS[clock]()
                model(**batch).loss.backward()
                times.append(CLOCKS[clock]() - start)
                model.zero_grad()
            milliseconds[length] = 1000 * statistics.median(times[1:])
        store[name] = {"label": system.label, "parameters": parameters, "milliseconds": milliseconds}
        print(name, milliseconds)


def see_everything(batch: dict[str, Any]) -> dict[str, Any]:
    """Every target position sees all real ones, the next token included."""
    real = batch["labels"] != -100
    return {**batch, "decoder_attention_mask": real[:, None, None].expand(-1, 1, real.shape[1], -1)}


def enlarge_queries(module: torch.nn.Module) -> None:
    """Undo what `attention_scaling` did to the initial queries."""
    if isinstance(module, ScaledQuery):
        module.weight.data /= module.gain


@app.command()
def ablations(
    task: TaskName, minutes: Minutes = 1.0, forcing_updates: Annotated[int, typer.Option(help="Of the LSTMs.")] = 800,
    updates: Updates = None, test_size: TestSize = 1000, clock: ClockName = "wall", folder: Folder = RESULTS,
    only: Names = None,
) -> None:  # fmt: skip
    """Take one thing away, train, and score greedy outputs beside the errors under the true prefix."""
    settings = {"task": task, "minutes": minutes, "updates": updates, "forcing_updates": forcing_updates,
                "test_size": test_size, "clock": clock, "threads": torch.get_num_threads()}  # fmt: skip
    store, board = Store(folder / f"ablations_{task}.json", settings), Board(TASKS[task], test_size)
    blind = {"input_ids": board.tokenizer(BLIND_SOURCE).input_ids}
    seeing = board.test
    for name in only or ABLATIONS:
        if name in store:
            continue
        ablation = ABLATIONS[name]
        config, parameters = fit(ablation.config, len(board.tokenizer), TASKS[task].parameters)
        set_seed(1)
        model = build(config)
        if not ablation.scores_as_large:
            model.apply(enlarge_queries)
        total = forcing_updates if ablation.fixed_updates else updates
        result = train(
            board, model, ablation.peak, Budget(CLOCKS[clock], minutes, total), seed=1,
            dataset=board.train.map(lambda row: blind) if ablation.blind else None,
            change_batch=see_everything if ablation.see_everything else lambda batch: batch,
            schedule=ablation.schedule(forcing_updates) if ablation.schedule else None,
        )  # fmt: skip
        board.test = seeing.map(lambda row: blind) if ablation.blind else seeing
        sources = [BLIND_SOURCE] * len(board.sources) if ablation.blind else board.sources
        outputs = board.decode(model, sources, num_beams=1)
        examples = [[board.sources[row], board.references[row][0], outputs[row]] for row in range(min(3, len(outputs)))]
        result |= forced(board, model)
        result |= {"label": ablation.label, "parameters": parameters, "scores": board.scores(outputs),
                   "examples": examples}  # fmt: skip
        store[name] = result
        print(name, result)


@app.command()
def words(
    model: Path, test: str = TASKS["cmudict"].data.format(split="test"), batch_size: int = 64, folder: Folder = RESULTS
) -> None:
    """Score a grapheme-to-phoneme model: any listed pronunciation of a word counts, or only the first."""
    pairs = read_pairs(test)
    pairs = pairs.add_column("accepted", references(pairs))
    with tempfile.TemporaryDirectory() as outputs:
        report = evaluate_model(
            model, pairs, outputs, metrics=["wer"], references_column="accepted", batch_size=batch_size
        )
        lines = (Path(outputs) / "predictions.default.jsonl").read_text().split("\n")
    predictions = [json.loads(line)["prediction"] for line in lines if line]
    first = headline(compute_scores(predictions, list(pairs["target"]), ["wer"]))
    marker = json.loads((model / "complete.json").read_text())
    result = {
        "model": str(model), "test_words": report["rows"], "parameters": report["settings"]["parameters"],
        "generation": report["settings"]["generation_config"], "training": marker,
        "any_pronunciation": report["strategies"]["default"]["headline"], "first_pronunciation": first,
        "sentences_per_second": report["strategies"]["default"]["sentences_per_second"],
    }  # fmt: skip
    (folder / "g2p_cmudict.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(json.dumps(rounded(result), indent=1))


@app.command()
def report(folder: Folder = RESULTS) -> None:
    """Write history.md and the plots from the results that are there."""
    print(write_report(folder))


if __name__ == "__main__":
    disable_progress_bar()
    app()
