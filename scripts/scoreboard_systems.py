"""What scoreboard.py compares: the tasks, the systems with their sizes and learning rates, and the ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from dragoman.models import modeling_dragoman_rnn
from dragoman.models.recurrent_attention import ContextAsState, Recurrence, Source, Step, masked_softmax, run
from dragoman.training.arguments import preset


ROOT = Path(__file__).parents[1]
BLIND_SOURCE = "x"


@dataclass(frozen=True)
class Task:
    """Pairs, how they are cut into tokens, and how outputs are scored."""

    data: str  # what read_pairs reads, with {split}
    tokenizer: dict[str, Any]
    metrics: tuple[str, ...]
    parameters: int  # of every system
    max_length: int  # tokens of a training source or target; longer pairs are dropped
    max_new_tokens: int
    buckets: tuple[int, ...]  # longest source of each bucket of the length plot, in words (letters)
    batch_size: int = 64


TASKS = {
    "cmudict": Task(
        data=str(ROOT / "data/cmudict_g2p/{split}.jsonl.gz"),
        tokenizer={"kind": "word", "vocab_size": 100},
        metrics=("wer",),
        parameters=500_000,
        max_length=30,
        max_new_tokens=30,
        buckets=(4, 5, 6, 7, 8, 9, 10, 12, 99),
    ),
    "ddtp_en_it": Task(
        data=str(ROOT / "data/ddtp_en_it/{split}.jsonl.gz"),
        tokenizer={"kind": "bpe", "vocab_size": 2000},
        metrics=("bleu", "chrf"),
        parameters=1_500_000,
        max_length=60,
        max_new_tokens=90,
        buckets=(4, 8, 12, 16, 22, 99),
    ),
    "tiny_en_it": Task(
        data="embedded:tiny_en_it/{split}",
        tokenizer={"kind": "bpe", "vocab_size": 400},
        metrics=("bleu", "chrf"),
        parameters=300_000,
        max_length=60,
        max_new_tokens=20,
        buckets=(2, 4, 99),
        batch_size=16,
    ),
}


def recurrent(name: str, width: int, **changes: Any) -> PreTrainedConfig:
    """A recurrent preset with one table of embeddings, half as wide as the states, and the dropout of the others."""
    width = width // 2 * 2  # a bidirectional encoder splits it
    return preset(name, embedding_dim=width // 2, hidden_size=width, dropout=0.1, share_embeddings=True, **changes)


def heads_and_mlp(width: int, ratio: float) -> tuple[int, int]:
    """Widths of the states and of the MLPs: heads need steps of 8, and MLPs wider than `ratio` fill the gaps."""
    states = width // 8 * 8
    return states, round(ratio * states) + 10 * (width - states)


def transformer(name: str, width: int, **changes: Any) -> PreTrainedConfig:
    """A Transformer preset with 3 + 3 layers, MLPs about as wide in proportion as its own, the loss of the others."""
    width, mlp = heads_and_mlp(width, preset(name).encoder_ffn_dim / preset(name).d_model)
    sizes = {"d_model": width, "encoder_layers": 3, "decoder_layers": 3}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_attention_heads": 4, f"{side}_ffn_dim": mlp}
    return preset(name, **{**sizes, "dropout": 0.1, "label_smoothing": 0.0, **changes})


def decoder_only(width: int, vocab_size: int) -> PreTrainedConfig:
    width, mlp = heads_and_mlp(width, 8 / 3)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=mlp, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, initializer_range=width**-0.5,  # as ours; the stock 0.02 is for much wider models
    )  # fmt: skip


@dataclass(frozen=True)
class System:
    label: str
    config: Callable[..., PreTrainedConfig]  # (width=, vocab_size=)
    peak: float  # learning rate, where none was searched for the task
    recurrence: type[Recurrence] | None = None  # instead of the one that the configuration asks for


SYSTEMS = {
    "gru_2014": System("GRU, no attention (Cho 2014)", partial(recurrent, "gru_2014"), 8e-3),
    "lstm_2014": System(
        "LSTM reversed, no attention (Sutskever 2014)",
        partial(recurrent, "lstm_2014", encoder_layers=2, decoder_layers=2), 8e-3,
    ),
    "lstm_additive": System("LSTM + additive (Bahdanau 2015)", partial(recurrent, "lstm_bahdanau"), 8e-3),
    "lstm_dot": System(
        "LSTM + dot (Luong 2015)", partial(recurrent, "lstm_luong", encoder_layers=2, decoder_layers=2), 8e-3
    ),
    "attention_edm": System("AttentionEDM, teacher forcing 0.5", partial(recurrent, "attention_edm"), 8e-3),
    "attention_edm_forced": System(
        "AttentionEDM, teacher forcing 1.0", partial(recurrent, "attention_edm", teacher_forcing_ratio=1.0), 8e-3
    ),
    "transformer_2017": System("Transformer (Vaswani 2017)", partial(transformer, "transformer_2017"), 2e-3),
    "modern": System("modern Transformer", partial(transformer, "modern"), 4e-3),
    "decoder_only": System("decoder-only (stock Llama)", decoder_only, 2e-3),
}  # fmt: skip


class KeptState(ContextAsState):
    """AttentionEDM that keeps every layer's previous h, to ask with it, to add the context to it, or neither."""

    first_state = 0  # h is taken over from the encoder too
    asks, adds = False, False

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        previous, cell = state  # (L, B * g, D)
        sources, g, _, length = source.visible.shape
        if self.asks:
            query = previous.unflatten(1, (sources, g)).transpose(0, 1)
        else:
            query = self.q_proj(inputs).view(sources, 1, g, -1)
        scores = query @ source.values.transpose(2, 3) / self.divisor(source)
        weights = masked_softmax(scores, source.visible.transpose(1, 2))
        contexts = (weights @ source.values).transpose(0, 1).flatten(1, 2)
        outputs, state = run(self.rnn, inputs, (contexts + previous if self.adds else contexts.contiguous(), cell))
        return Step(outputs, state, state[0], tuple(weights.transpose(0, 1).reshape(-1, sources * g, 1, length)))


class Asking(KeptState):
    asks = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.q_proj = torch.nn.Identity()  # no weights without a use


class Adding(KeptState):
    adds = True


class AskingAndAdding(Asking):
    adds = True


edm = partial(recurrent, "attention_edm", teacher_forcing_ratio=1.0)
EDM_VARIANTS = {  # of attention_edm_forced, one thing changed in each but the third; then the LSTM that beats it
    "edm_asks": System("query: the state, not the input", edm, 8e-3, Asking),
    "edm_adds": System("context added to the state, not in its place", edm, 8e-3, Adding),
    "edm_asks_adds": System("both", edm, 8e-3, AskingAndAdding),
    "edm_reversed": System("source reversed", partial(edm, reverse_source=True), 8e-3),
    "edm_bidirectional": System("source read both ways", partial(edm, bidirectional_encoder=True), 8e-3),
    "lstm_forwards": System(
        "LSTM of 2014, no attention, source not reversed",
        partial(recurrent, "lstm_2014", encoder_layers=2, decoder_layers=2, reverse_source=False),
        8e-3,
    ),
}


def build(config: PreTrainedConfig, recurrence: type[Recurrence] | None = None) -> PreTrainedModel:
    if isinstance(config, LlamaConfig):
        return LlamaForCausalLM(config)
    if recurrence is None:
        return AutoModelForSeq2SeqLM.from_config(config)
    with patch.object(modeling_dragoman_rnn, "make_recurrence", recurrence):
        return AutoModelForSeq2SeqLM.from_config(config)


def fit(
    config: Callable[..., PreTrainedConfig],
    vocab_size: int,
    parameters: int,
    recurrence: type[Recurrence] | None = None,
) -> tuple[PreTrainedConfig, int]:
    """The configuration whose number of parameters comes nearest to the wanted one, and that number.

    Raises:
        ValueError: no width comes within 5 %, which keeps any two systems within 10 % of each other.
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return build(config(width=width, vocab_size=vocab_size), recurrence).num_parameters()

    above = next(width for width in range(16, 2048, 8) if count(width) > parameters)
    counts = {width: count(width) for width in range(max(16, above - 8), above + 1)}
    width = min(counts, key=lambda width: abs(counts[width] - parameters))
    if abs(counts[width] - parameters) > 0.05 * parameters:
        raise ValueError(
            f"no width comes within 5 % of {parameters:,} parameters: the nearest, {width}, has {counts[width]:,}"
        )
    return config(width=width, vocab_size=vocab_size), counts[width]


@dataclass(frozen=True)
class Ablation:
    label: str
    config: Callable[..., PreTrainedConfig]
    peak: float = 2e-3
    fixed_updates: bool = False  # the same number of updates as others of its kind instead of the same time
    schedule: Callable[[int], dict[str, Any]] | None = None  # number of updates -> schedule of scheduled sampling
    see_everything: bool = False  # train without the look-ahead mask
    blind: bool = False  # source cut off, in training and in decoding: every source is BLIND_SOURCE
    scores_as_large: bool = True  # unscaled attention: let the initial queries make up for it, as the library does


heads = partial(
    transformer, "transformer_prenorm", share_embeddings=True, tie_lm_head=True, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=8, decoder_attention_heads=8,
    scale_embedding=True,  # or else positions of amplitude 1 drown tokens of amplitude d_model ** -0.5 for long
)  # fmt: skip
forcing = partial(recurrent, "attention_edm", attention="general", encoder_layers=1, decoder_layers=1)
ABLATIONS = {
    "baseline": Ablation("Transformer, 8 heads, sinusoidal positions", heads),
    "no_positions": Ablation("no positions", partial(heads, position_embedding_type="none")),
    "one_head": Ablation("1 head", partial(heads, encoder_attention_heads=1, decoder_attention_heads=1)),
    "no_look_ahead_mask": Ablation("no look-ahead mask in training", heads, see_everything=True),
    "no_source": Ablation("cross-attention cut: every source reads `x`", heads, blind=True),
    "unscaled": Ablation(
        "scores not divided by sqrt(d_k), same initial weights",
        partial(heads, attention_scaling=1.0), scores_as_large=False,
    ),
    "unscaled_small_queries": Ablation(
        "the same, smaller initial queries (the library's choice)", partial(heads, attention_scaling=1.0)
    ),
    "forcing_1": Ablation(
        "LSTM, teacher forcing 1.0", partial(forcing, teacher_forcing_ratio=1.0), fixed_updates=True
    ),
    "forcing_half": Ablation(
        "LSTM, teacher forcing 0.5", partial(forcing, teacher_forcing_ratio=0.5), fixed_updates=True
    ),
    "forcing_linear": Ablation(
        "LSTM, teacher forcing 1.0 to 0.0, linear", forcing, fixed_updates=True,
        schedule=lambda updates: {"kind": "linear", "k": 1.0, "slope": 1 / updates},
    ),
}  # fmt: skip
