"""Converted checkpoints against the classes of Transformers they come from, on randomly initialized models.

    python scripts/parity.py
    python scripts/parity.py --family t5 --output scripts/results/parity.md
    python scripts/parity.py --show          # the record that lies beside this script, a line a family

Every model has odd sizes and random numbers in every weight, norms and biases included. The rows of a family cover
every pair of values of the switches that change its results. Each model is saved, converted, loaded again as it is and
as a Dragoman model, and compared on padded batches: logits and loss in float64 and float32, tokens of greedy search,
five beams and seeded sampling in float64.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from dragoman.conversion import convert


SIZES = {
    "vocab_size": 41,
    "d_model": 12,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 19,
    "max_position_embeddings": 31,
    "forced_eos_token_id": None,
}
T5_SIZES = {"vocab_size": 41, "d_model": 12, "d_ff": 17, "decoder_start_token_id": 0}

# A value of a switch is settings of the configuration; those with an underscore are done to the model.
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
BART_SWITCHES = {
    "ties": {"tied": TIED, "untied": UNTIED, "own head": {**TIED, "_own_head": True}},
    "embeddings": {"scaled": {"scale_embedding": True}, "as they are": {"scale_embedding": False}},
    "layers": {"2+3": {"encoder_layers": 2, "decoder_layers": 3}, "3+1": {"encoder_layers": 3, "decoder_layers": 1}},
    "heads": {
        "2+3": {"encoder_attention_heads": 2, "decoder_attention_heads": 3},
        "4+1": {"encoder_attention_heads": 4, "decoder_attention_heads": 1},
    },
    "activation": {name: {"activation_function": name} for name in ("gelu", "relu", "swish")},
}
BIAS = {"bias": {"no bias": {}, "bias": {"_logits_bias": True}}}
T5_SWITCHES = {
    "head": {"tied": {}, "own head": {"_own_head": True}},
    # Stock T5 cannot generate with more layers in the decoder than in the encoder: its cache has too few.
    "layers": {"3+2": {"num_layers": 3, "num_decoder_layers": 2}, "2+2": {"num_layers": 2}},
    "heads": {"3x5": {"num_heads": 3, "d_kv": 5}, "4x2": {"num_heads": 4, "d_kv": 2}},
    "mlp": {name: {"feed_forward_proj": name} for name in ("relu", "gated-gelu", "gated-silu")},
    "buckets": {
        "32/128": {},
        "6/9": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 9},
    },
}


@dataclass(frozen=True)
class Family:
    """A class of Transformers, its sizes here, its switches, and what its own kind of generation needs."""

    model_class: str
    config_class: str
    sizes: dict[str, Any]
    switches: dict[str, dict[str, dict[str, Any]]]
    generation: dict[str, Any]
    pads_left: bool = False  # whether the stock class gives the same with padding on the left


FAMILIES = {
    "marian": Family(
        "MarianMTModel",
        "MarianConfig",
        {**SIZES, "pad_token_id": 40, "decoder_start_token_id": 40, "eos_token_id": 0},
        {
            **BART_SWITCHES,
            **BIAS,
            "vocabularies": {
                "one": {},
                "two": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 43},
            },
        },
        {"bad_words_ids": [[40]], "forced_eos_token_id": 0},
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        SIZES,
        {**BART_SWITCHES, **BIAS},
        {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "no_repeat_ngram_size": 2},
    ),
    "mbart": Family(
        "MBartForConditionalGeneration",
        "MBartConfig",
        {**SIZES, "decoder_start_token_id": 2},
        {**BART_SWITCHES, **BIAS},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    ),
    "pegasus": Family(
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        SIZES,
        {**BART_SWITCHES, **BIAS},
        {"num_beams": 3, "length_penalty": 0.8, "forced_eos_token_id": 1},
    ),
    "blenderbot": Family(
        "BlenderbotForConditionalGeneration",
        "BlenderbotConfig",
        SIZES,
        {**BART_SWITCHES, **BIAS},
        {"encoder_no_repeat_ngram_size": 3, "min_length": 4},
    ),
    "m2m_100": Family(
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        SIZES,
        {**BART_SWITCHES, "padding": {"1": {}, "3": {"pad_token_id": 3}}},
        {"forced_bos_token_id": 9},
        pads_left=True,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        T5_SIZES,
        # The field of this name in a T5 config means the scaling, not the tie.
        {**T5_SWITCHES, "logits": {"scaled": {"tie_word_embeddings": True}, "not": {"tie_word_embeddings": False}}},
        {"num_beams": 2},
        pads_left=True,
    ),
    "mt5": Family("MT5ForConditionalGeneration", "MT5Config", T5_SIZES, T5_SWITCHES, {}, pads_left=True),
}


@dataclass(frozen=True)
class Case:
    """One model: its family and the value of each switch."""

    family: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}: {', '.join(self.values)}"

    def value(self, switch: str) -> str:
        return self.values[list(FAMILIES[self.family].switches).index(switch)]

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """The stock model in float32 with random numbers everywhere, ready to be saved."""
        family = FAMILIES[self.family]
        settings = dict(family.sizes)
        for value, choices in zip(self.values, family.switches.values(), strict=True):
            settings |= choices[value]
        settings |= changes
        config_class = getattr(transformers, family.config_class)
        config = config_class(**{name: value for name, value in settings.items() if not name.startswith("_")})
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)(config).eval()
        if settings.get("_own_head"):
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:  # all but sinusoids
                    parameter.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.4)
            if settings.get("_logits_bias"):
                model.final_logits_bias.normal_()
        special = {
            name: getattr(model.generation_config, name)
            for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
        }
        suppressed = {"suppress_tokens": [config.pad_token_id]}  # see EXPLANATION
        model.generation_config = GenerationConfig(**{**special, "max_length": 11, **suppressed, **family.generation})
        return model


def covering_rows(switches: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of values in which every two values of two switches meet at least once; the first values first."""

    def pairs(row: tuple[str, ...]) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*switches.values()))
    left = set().union(*map(pairs, rows))
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        yield best


CASES = [Case(name, row) for name, family in FAMILIES.items() for row in covering_rows(family.switches)]


# ---------------------------------------------------------------- the stock classes, wholly in double precision


def in_double(model: Any) -> Any:
    """
    A stock model in float64, in which two things are computed in float32 all the same: the mean square of T5's norms,
    and the tables of sinusoids. Here they are computed in float64, so that a difference of 1e-9 means something.
    """
    model = model.double()
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("T5LayerNorm"):
            module.forward = functools.partial(_norm, module)
        elif kind == "M2M100SinusoidalPositionalEmbedding":
            module.weights = _sinusoids(*module.weights.shape, steps=module.weights.shape[1] // 2 - 1)
            module.weights[module.padding_idx] = 0
        elif kind.endswith("SinusoidalPositionalEmbedding"):
            module.weight.data = _sinusoids(*module.weight.shape, steps=module.weight.shape[1] // 2)
    return model


def _norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    return module.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def _sinusoids(length: int, width: int, steps: int) -> torch.Tensor:
    frequency = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / steps)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


# ---------------------------------------------------------------- comparison


@dataclass
class Difference:
    """What two models disagree in: differences as parts of the largest logit or 1, decodings whose tokens differ."""

    double: float  # logits in float64, the stock class wholly so
    loss: float
    stock: float  # logits in float64, the stock class as it is
    single: float  # logits in float32
    tokens: list[str]

    @property
    def within(self) -> bool:
        return self.double <= 1e-9 and self.loss <= 1e-9 and not self.tokens


def batches(family: Family, config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Sources and targets of different lengths, padded."""
    generator = torch.Generator().manual_seed(5)
    pad, eos = config.pad_token_id, config.eos_token_id
    for side in ("right", "left") if family.pads_left else ("right",):
        input_ids = torch.randint(4, 40, (3, 7), generator=generator)
        labels = torch.randint(4, 40, (3, 6), generator=generator)
        mask = torch.ones_like(input_ids)
        for row, short in enumerate((0, 3, 1)):
            mask[row, 7 - short :] = 0
            labels[row, 6 - row - 1] = eos
            labels[row, 6 - row :] = -100
        if side == "left":
            mask = mask.flip(1)
        yield {"input_ids": input_ids.masked_fill(mask == 0, pad), "attention_mask": mask, "labels": labels}


DECODINGS = {
    "greedy": {"num_beams": 1},
    "beam 5": {"num_beams": 5, "num_return_sequences": 2},
    # A dictionary is returned by the host's loop alone, where ended rows go on drawing random numbers.
    "sampling": {"do_sample": True, "num_beams": 1, "top_k": 0, "return_dict_in_generate": True},
}


def decode(model: Any, batch: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    found = model.generate(**batch, **settings)
    return found if isinstance(found, torch.Tensor) else found.sequences


@torch.no_grad()
def compare(stock_folder: str | Path, converted_folder: str | Path, family: Family) -> Difference:
    def load(folder: str | Path, dtype: torch.dtype) -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()

    def apart(one: Any, other: Any) -> tuple[float, float]:
        logits, loss = 0.0, 0.0
        for batch in batches(family, one.config):
            left, right, real = one(**batch), other(**batch), batch["labels"] != -100
            largest = max(1.0, left.logits[real].abs().max().item())
            logits = max(logits, (left.logits - right.logits)[real].abs().max().item() / largest)
            loss = max(loss, (left.loss - right.loss).abs().item() / max(1.0, left.loss.item()))
        return logits, loss

    ours = load(converted_folder, torch.float64)
    stock = load(stock_folder, torch.float64)
    as_it_is, _ = apart(stock, ours)
    stock = in_double(stock)
    double, loss = apart(stock, ours)
    tokens = []
    for name, settings in DECODINGS.items():
        for batch in batches(family, stock.config):
            del batch["labels"]
            sequences = []
            for model in (stock, ours):
                torch.manual_seed(3)
                sequences.append(decode(model, batch, settings))
            if not torch.equal(*sequences) and name not in tokens:
                tokens.append(name)
    single, _ = apart(load(stock_folder, torch.float32), load(converted_folder, torch.float32))
    return Difference(double, loss, as_it_is, single, tokens)


def run_case(case: Case, folder: Path) -> Difference:
    """Saves, converts and compares one model in a folder of its own."""
    case.build().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "converted")
    return compare(folder / "stock", folder / "converted", FAMILIES[case.family])


EXPLANATION = """\
A difference is the largest of any logit of a real position, divided by the largest logit or 1. In the column float64
the stock class computes T5's norms and the tables of sinusoids in float64 too; as it is, it rounds those to float32
(next column but one). Tokens: greedy search, five beams with two results, seeded sampling, all in float64. No model may
produce the padding token: the stock M2M100 numbers positions by ids, so it would treat a generated one as padding.
"""


RECORD = Path(__file__).parent / "results" / "parity.md"


def summary(record: str) -> str:
    """A line for each family: its models, the largest differences among them, and whether all tokens were equal."""
    table = [line.strip("| ").split(" | ") for line in record.splitlines() if line.startswith("|")]
    families: dict[str, list[list[str]]] = {}
    for name, *cells in table[2:]:
        families.setdefault(name, []).append(cells)
    lines = [
        "| family | models | float64 | loss | float32 | tokens |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, found in families.items():
        largest = (max((cells[column] for cells in found), key=float) for column in (1, 2, 4))
        tokens = "equal" if all(cells[5] == "equal" for cells in found) else "differ"
        lines.append(f"| {name} | {len(found)} | {' | '.join(largest)} | {tokens} |")
    return "\n".join(lines)


def main(
    family: Annotated[list[str] | None, typer.Option(help="Only these; repeat for more.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file for the table, besides standard output.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what was recorded, a line a family, instead.")] = False,
) -> None:
    """Print the table family x switches x differences; exit status 1 if one is too large."""
    if show:
        print(summary(RECORD.read_text(encoding="utf-8")))
        return
    transformers.utils.logging.disable_progress_bar()
    cases = [case for case in CASES if not family or case.family in family]
    lines = [
        "| family | switches | float64 | loss | float64, stock as it is | float32 | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed, worst = 0, 0.0
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = run_case(case, Path(folder))
        failed += not found.within
        worst = max(worst, found.double)
        figures = " | ".join(f"{value:.1e}" for value in (found.double, found.loss, found.stock, found.single))
        tokens = f"differ in {', '.join(found.tokens)}" if found.tokens else "equal"
        lines.append(f"| {case.family} | {', '.join(case.values)} | {figures} | {tokens} |")
        print(lines[-1], flush=True)
    closing = f"{len(cases)} models, {failed} beyond 1e-9 or with other tokens; largest difference {worst:.1e}"
    print(f"\n{closing}")
    if output is not None:
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        introduction = (
            "# Converted checkpoints against the stock classes\n\n"
            f"`python scripts/parity.py --output scripts/results/parity.md` ({versions}): {closing}.\n\n{EXPLANATION}\n"
        )
        output.write_text(introduction + "\n".join(lines) + "\n", encoding="utf-8")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
