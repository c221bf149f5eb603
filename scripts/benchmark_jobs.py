"""The rows of `benchmark_generation.py` in which trained models translate whole files."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import spread, take_turns
from transformers import GenerationMixin

from dragoman.conversion import convert, export
from dragoman.data.reading import read_pairs
from dragoman.data.tokenizers import source_and_target_tokenizer
from dragoman.evaluation.compare import compare_texts
from dragoman.inference.loading import load
from dragoman.inference.translate import Hypothesis, score_hypotheses, translate
from dragoman.models import decoding_loops


HEADER = "| work (peer) | peer | ours | ratio | goal |"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Job:
    """A file of sentences with their references, and how it is translated."""

    name: str
    sentences: list[str]
    references: list[str | list[str]]
    repeats: int
    threads: int
    clock: str
    beams: int = 5
    batch_size: int = 32

    def translate(self, model, tokenizer, **arguments: Any) -> list[Hypothesis]:
        settings = {"batch_size": self.batch_size, "num_beams": self.beams, "scores": False, **arguments}
        return [best for best, *_ in translate(model, tokenizer, self.sentences, **settings)]

    def take_turns(self, sides: list[Callable[[], Any]]) -> tuple[list[list[float]], list[Any]]:
        return take_turns(sides, self.repeats, CLOCKS[self.clock])

    def row(self, what: str, times: list[list[float]], goal: str) -> str:
        """The line of `summary` for the seconds of the peer and of ours."""
        rates = [len(self.sentences) / statistics.median(side) for side in times]
        seconds = "sentences/s" if self.clock == "wall" else "sentences per second of the processor"
        return f"| {what}, {seconds} | {rates[0]:.1f} | {rates[1]:.1f} | {spread(*times)} | {goal} |"

    def difference(self, what: str, peer: list[str], ours: list[str], goal: str) -> str:
        found = compare_texts(peer, ours, self.references)
        return (
            f"| {what}, chrF | {found.scores[0]:.2f} | {found.scores[1]:.2f} | {found.difference:+.2f} ± "
            f"{found.difference_interval:.2f} | {goal} |"
        )

    def __str__(self) -> str:
        turns = f"medians of {self.repeats} turns of each side" if self.repeats > 1 else "each side once"
        return f"{len(self.sentences)} sentences of {self.name}, beam {self.beams}, {turns}"


def read_job(data: str, limit: int | None, **settings: Any) -> Job:
    pairs = list(read_pairs(data))[:limit]
    return Job(Path(data).name, [str(pair["source"]) for pair in pairs], [pair["target"] for pair in pairs], **settings)


def summary(rows: list[str]) -> list[str]:
    return ["", HEADER, "|---|--:|--:|--:|--:|", *rows]


def read_model(folder: Path):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    for setting in ("num_beams", "forced_eos_token_id", "no_repeat_ngram_size"):
        setattr(model.generation_config, setting, None)
    return model


HOSTS = {
    "Marian": (transformers.MarianConfig, transformers.MarianMTModel, 2048),  # of sinusoids, which reach anywhere
    "BART": (transformers.BartConfig, transformers.BartForConditionalGeneration, None),
}


@torch.no_grad()
def host_with_weights_of(model: Any, scratch: Path) -> tuple[str, Any] | None:
    """
    The host's class computing what this model does, and its name, or None if the model is of no such shape. Which
    weight goes where is read off the conversion of one that is filled with random numbers.
    """
    names = ("vocab_size", "d_model", "activation_function", "scale_embedding")
    sizes = ("layers", "attention_heads", "ffn_dim")
    names += tuple(f"{side}_{size}" for side in ("encoder", "decoder") for size in sizes)
    names += ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    settings = {name: value for name, value in model.config.to_dict().items() if name in names}

    def content(weight: torch.Tensor) -> tuple[float, ...]:
        flat = weight.flatten()
        return flat.numel(), *flat[:1].tolist(), *flat[-1:].tolist()

    for name, (config_class, host_class, positions) in HOSTS.items():
        settings["max_position_embeddings"] = positions or model.config.max_position_embeddings
        host = host_class(config_class(**settings)).eval()
        for weight in (one for one in host.parameters() if one.requires_grad):
            weight.normal_(std=0.1)
        if model.config.lm_head_bias:
            host.final_logits_bias.normal_(std=0.1)
        host.save_pretrained(scratch / name)
        convert(scratch / name, scratch / f"converted-{name}")
        converted, trained = read_model(scratch / f"converted-{name}").state_dict(), model.state_dict()
        if {name: weight.shape for name, weight in converted.items()} != {n: w.shape for n, w in trained.items()}:
            continue
        places = {content(weight): name for name, weight in converted.items()}
        for weight in host.state_dict().values():
            for rows in (weight, weight[2:]):  # BART's table of positions begins with two rows that it never reads
                if content(rows) in places:  # all but the sinusoids
                    rows.copy_(trained[places[content(rows)]].view_as(rows))
                    break
        ids = {"input_ids": torch.arange(3, 10)[None], "decoder_input_ids": torch.arange(4, 9)[None]}
        one, other = (side(**ids).logits for side in (model, host))
        if torch.allclose(one, other, rtol=1e-3, atol=1e-3):
            return name, host
    return None


def with_the_hosts_loops(model: Any):
    """The same model without anything of ours in `generate`."""

    class Stock(type(model)):  # type: ignore[misc]
        generate = GenerationMixin.generate
        _prepare_text_encoder_decoder_kwargs_for_generation = (
            GenerationMixin._prepare_text_encoder_decoder_kwargs_for_generation
        )
        _sample, _beam_search = GenerationMixin._sample, GenerationMixin._beam_search
        _expand_inputs_for_generation = GenerationMixin._expand_inputs_for_generation

        def _reorder_cache(self, past_key_values, beam_idx):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values

    stock = Stock(model.config).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def stock_generate(stock, tokenizer, sentences: list[str], beams: int) -> list[Hypothesis]:
    """The host's `generate` on batches of 32 in the order of the file."""
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(tokenizer)
    ends = stock.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for start in range(0, len(sentences), 32):
        batch = source_tokenizer(sentences[start : start + 32], padding=True, return_tensors="pt")
        rows = stock.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams)
        for text, row in zip(target_tokenizer.batch_decode(rows, skip_special_tokens=True), rows.tolist(), strict=True):
            length = next((place for place, token in enumerate(row) if place and token in ends), len(row)) + 1
            found.append(Hypothesis(text, row[1:length], row[0]))
    return found


def differences(model, stock, tokenizer, job: Job, found: list[list[Hypothesis]]) -> str:
    """How many outputs of two sides have other tokens, and whether rounding explains that."""
    other = [place for place, (one, two) in enumerate(zip(*found, strict=True)) if one.token_ids != two.token_ids]
    told = f"{len(job.sentences) - len(other)} of {len(job.sentences)} outputs have the same tokens."
    if not other:
        return told
    sentences = [job.sentences[place] for place in other]
    model, stock = copy.deepcopy(model).double(), copy.deepcopy(stock).double()
    for side in found:
        score_hypotheses(model, tokenizer, sentences, [[side[place]] for place in other])
    scores = np.array([[side[place].score for place in other] for side in found])
    one = stock_generate(stock, tokenizer, sentences, job.beams)
    two = translate(model, tokenizer, sentences, scores=False, num_beams=job.beams)
    equal = sum(best.token_ids == theirs.token_ids for theirs, (best, *_) in zip(one, two, strict=True))
    close = int((np.abs(scores[0] - scores[1]) < 1e-5).sum())
    return f"{told} Of the other {len(other)}, {close} differ in score by less than 1e-5; in float64 {equal} are equal."


def against_stock(job: Job, folder: Path, scratch: Path) -> list[str]:
    """Sentences per second of `translate` against the host's `generate` on batches of 32 in the order of the file."""
    model, tokenizer = load(folder, "cpu")
    peer, stock = host_with_weights_of(model, scratch) or ("loops", with_the_hosts_loops(model))
    stock.generation_config = model.generation_config
    sides = [
        lambda: stock_generate(stock, tokenizer, job.sentences, job.beams),
        lambda: job.translate(model, tokenizer),
    ]
    times, found = job.take_turns(sides)
    return [
        f"Whole job: {job}, {folder.name}: the host's {peer} with the same weights, generate() on batches of 32 in "
        f"file order, against translate() in sorted batches of {job.batch_size}. "
        f"{differences(model, stock, tokenizer, job, found)}",
        *summary([job.row(f"whole job (the host's {peer})", times, ">= 3")]),
    ]


def against_ctranslate2(job: Job, folder: Path, scratch: Path) -> list[str]:
    """The export in 8 bits against `translate` of the same model in single precision."""
    import ctranslate2

    model, tokenizer = load(folder, "cpu", "float32")
    export(folder, scratch / "int8", format="ctranslate2", quantization="int8")
    translator = ctranslate2.Translator(str(scratch / "int8"), inter_threads=1, intra_threads=job.threads)
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(tokenizer)
    settings = model.generation_config
    length = settings.max_new_tokens or settings.max_length - 1
    # What CTranslate2 always does: a sentence is finished as soon as it has as many outputs as beams.
    search = {"early_stopping": True, "length_penalty": settings.length_penalty or 1.0, "max_new_tokens": length}

    def exported() -> list[str]:
        rows = [source_tokenizer.convert_ids_to_tokens(ids) for ids in source_tokenizer(job.sentences)["input_ids"]]
        results = translator.translate_batch(
            rows, beam_size=job.beams, length_penalty=search["length_penalty"], max_decoding_length=length,
            min_decoding_length=0, max_input_length=0, max_batch_size=job.batch_size,
        )  # fmt: skip
        ids = [target_tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        return target_tokenizer.batch_decode(ids, skip_special_tokens=True)

    times, (ours, eight_bits) = job.take_turns([lambda: job.translate(model, tokenizer, **search), exported])
    single = [best.text for best in ours]
    equal = sum(one == other for one, other in zip(single, eight_bits, strict=True))
    what = "CTranslate2 int8 export (our fp32)"
    return [
        f"CTranslate2: {job}, {folder.name}: translate() in single precision against the int8 export, both in sorted "
        f"batches of {job.batch_size}, early_stopping=True, at most {length} new tokens, {job.threads} threads. "
        f"{equal} outputs are equal; differences with 95 % intervals of paired bootstrap resampling.",
        *summary([job.row(what, times, ">= 1.5"), job.difference(what, single, eight_bits, "within 0.5")]),
    ]


def against_another(job: Job, folder: Path, other_folder: Path) -> list[str]:
    """A second model against the first one."""
    sides = [load(one, "cpu") for one in (folder, other_folder)]
    times, found = job.take_turns([lambda side=side: job.translate(*side) for side in sides])
    texts = [[best.text for best in side] for side in found]
    shapes = [
        f"{model.config.encoder_layers}+{model.config.decoder_layers} layers, {model.num_parameters():,} parameters"
        for model, _ in sides
    ]
    what = f"{other_folder.name} ({folder.name})"
    return [
        f"Two models: {job}: {folder.name} ({shapes[0]}) against {other_folder.name} ({shapes[1]}); differences with "
        "95 % intervals of paired bootstrap resampling.",
        *summary([job.row(what, times, ">= 1.7"), job.difference(what, *texts, "> -1")]),
    ]


class WatchedOutbox(decoding_loops.Outbox):
    """Notes what every step of the loops does: sources in the batch, those of them at work, seconds since the last."""

    steps: list[tuple[int, int, float]]
    clock: Callable[[], float]

    def __init__(self, sources: int, device: torch.device):
        super().__init__(sources, device)
        self.at_work = sources
        self.last: float | None = None  # the first step includes reading the source

    def put(self, rows: torch.Tensor, finished: torch.Tensor) -> torch.Tensor | None:
        now = self.clock()
        if self.last is not None:
            self.steps.append((len(finished), self.at_work, now - self.last))
        self.at_work = int((~finished).sum())
        staying = super().put(rows, finished)
        self.last = self.clock()
        return staying


def idle_places(job: Job, folder: Path) -> list[str]:
    """
    What would be gained if waiting sentences took the places of finished ones, at no cost at all: each step would then
    have a full batch. The seconds of a step with n sources are a + b * n, fitted to the steps that were taken; with a
    batch always full, a source's step costs a / batch size + b. Beside it: what a batch four times as large does.
    """
    model, tokenizer = load(folder, "cpu")
    clock = CLOCKS[job.clock]
    rows = []
    for beams in (1, job.beams):
        ratios, shares = [], []
        for _ in range(job.repeats + 1):
            watched = type("Watched", (WatchedOutbox,), {"steps": [], "clock": staticmethod(clock)})
            decoding_loops.Outbox, original = watched, decoding_loops.Outbox  # type: ignore[misc]
            try:
                start = clock()
                job.translate(model, tokenizer, num_beams=beams)
                total = clock() - start
            finally:
                decoding_loops.Outbox = original  # type: ignore[misc]
            size, at_work, seconds = np.array(watched.steps).T
            b, a = np.polyfit(size, seconds, 1)
            full = at_work.sum() * (max(a, 0) / job.batch_size + b)
            ratios.append(total / (total - seconds.sum() + min(full, seconds.sum())))
            shares.append((1 - size.sum() / len(size) / job.batch_size, 1 - at_work.sum() / len(size) / job.batch_size))
        sides = [
            lambda count=count, beams=beams: job.translate(model, tokenizer, num_beams=beams, batch_size=count)
            for count in (job.batch_size, 4 * job.batch_size)
        ]
        times, _ = job.take_turns(sides)
        left, idle = shares[-1]
        low, middle, high = np.quantile(ratios[1:], [0.25, 0.5, 0.75])
        rows += [
            f"| beam {beams} | {left:.0%} | {idle - left:.1%} | {1000 * a:.1f} + {1000 * b:.2f} n "
            f"| **{middle:.2f}** ({low:.2f} - {high:.2f}) | {spread(*times)} |"
        ]
    return [
        f"Refill: {job}, {folder.name}, sorted batches of {job.batch_size} that finished sentences leave. Shares of a "
        "batch's places on the average of all steps; milliseconds of a step with n sentences; how many times as fast "
        f"the whole job would be with places filled at no cost, and is in batches of {4 * job.batch_size}.",
        "",
        "| decoding | place left | finished, not left | ms a step | filled at no cost | larger batches |",
        "|---|--:|--:|--:|--:|--:|",
        *rows,
    ]
