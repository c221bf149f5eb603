"""The model families and their tiny sizes, in one list: every test of `tests/models/test_shared_*.py` runs over it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings

import dragoman
import reference
from dragoman.models import varlen
from training.experiments import shorten_trainings


settings.register_profile("fast", max_examples=60, derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)


def pytest_configure(config):
    settings.load_profile(config.getoption("--hypothesis-profile") or "fast")


def pytest_collection_modifyitems(items):
    # Files with long tests first: towards the end, processes that share the tests out are left with short ones.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session):
    shorten_trainings()


# The beginning of a script: the package is installed beside the tests, so it is hidden there.
WITHOUT_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dragoman":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
"""

# Pairwise different, so that no mix-up of dimensions goes unseen.
B, S, T, D, H, V = 3, 7, 5, 12, 2, 23
BOS, PAD, EOS = 0, 1, 2


@dataclass(frozen=True)
class Family:
    """One kind of model at tiny size. `build` gives it in float64, without dropout, ready for comparison."""

    name: str
    config_class: type
    model_class: type
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, **overrides):
        return self.config_class(**{**self.settings, **overrides})

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
        torch.manual_seed(seed)
        model = self.model_class(self.config(**overrides)).to(dtype).eval()
        model.generation_config.max_length = 11  # untrained models rarely end by themselves
        return model

    @property
    def is_transformer(self) -> bool:
        return self.config_class is dragoman.DragomanConfig


TRANSFORMER_SIZES = {
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 19,
    "max_position_embeddings": 29,
    "dropout": 0.0,
}

POST_NORM_2017 = {
    "norm_type": "layernorm",
    "norm_position": "post",
    "final_norm": False,
    "activation_function": "relu",
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
    "position_embedding_type": "sinusoidal",
    "scale_embedding": True,
}

PRE_NORM = {
    **POST_NORM_2017,
    "norm_position": "pre",
    "final_norm": True,
    "activation_function": "gelu",
    "scale_embedding": False,
    "source_vocab_size": 31,
    "share_embeddings": False,
    "tie_lm_head": False,
    "lm_head_bias": True,
}


def transformer(name: str, **settings) -> Family:
    return Family(
        name,
        dragoman.DragomanConfig,
        dragoman.DragomanForConditionalGeneration,
        {**TRANSFORMER_SIZES, **settings},
    )


RNN_SIZES = {
    "vocab_size": V,
    "embedding_dim": 9,
    "hidden_size": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "tie_lm_head": False,
    "dropout": 0.0,
}


def rnn(name: str, **settings) -> Family:
    return Family(
        name, dragoman.DragomanRnnConfig, dragoman.DragomanRnnForConditionalGeneration, {**RNN_SIZES, **settings}
    )


FAMILIES = [
    transformer("modern", encoder_num_key_value_heads=1, decoder_num_key_value_heads=1),
    transformer("2017", **POST_NORM_2017),
    transformer("prenorm", **PRE_NORM),
    transformer("learned", position_embedding_type="learned", embedding_norm=True, qk_norm=True),
    transformer(
        "relative",
        position_embedding_type="relative",
        relative_num_buckets=6,
        relative_max_distance=9,
        attention_scaling=1.0,
        logit_scale=D**-0.5,
        encoder_head_dim=5,
        decoder_head_dim=4,
    ),
    transformer("unordered", position_embedding_type="none", attention_direction="unidirectional"),
    rnn(
        "gru",
        cell="gru",
        attention="none",
        bidirectional_encoder=False,
        context_every_step=True,
        embedding_dim=D,
        tie_lm_head=True,
    ),
    rnn("lstm", attention="none", bidirectional_encoder=False, reverse_source=True, lm_head_bias=True),
    rnn("bahdanau", attention="additive", context_every_step=True, encoder_layers=3),
    rnn("luong", attention="dot", input_feeding=True, share_embeddings=False, source_vocab_size=31),
    rnn("general"),
    rnn("edm", attention="context_as_state", attention_direction="unidirectional"),
    rnn("plain", cell="rnn", attention="scaled_dot", bidirectional_encoder=False),
]


def family(name: str) -> Family:
    """The family of this name."""
    return next(candidate for candidate in FAMILIES if candidate.name == name)


@pytest.fixture(params=FAMILIES, ids=lambda one: one.name)
def any_family(request) -> Family:
    return request.param


@pytest.fixture(params=[one for one in FAMILIES if one.is_transformer], ids=lambda one: one.name)
def any_transformer(request) -> Family:
    return request.param


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """Slow kernels in the place of those that need a GPU."""
    monkeypatch.setattr(varlen, "varlen_attn", reference.varlen_attn)
    monkeypatch.setattr(varlen, "check_kernel", lambda device, dtype, head_dim: None)


@pytest.fixture
def model(any_family):
    return any_family.build()


@pytest.fixture
def batch():
    return make_batch()


def make_batch(
    seed: int = 1, rows: int = B, source_vocab: int = V, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Token ids with pads: sources of S, S - 3, S - 1, ... tokens, targets of T, T - 1, T - 2, ... tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, V, (rows, S), generator=generator)
    labels = torch.randint(3, V, (rows, T), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        short = (0, 3, 1)[row % 3]
        if short:
            hidden = slice(S - short, None) if padding_side == "right" else slice(0, short)
            attention_mask[row, hidden] = 0
            if padding_side == "left":  # the same tokens, moved
                input_ids[row, short:] = input_ids[row, : S - short].clone()
            input_ids[row, hidden] = PAD
        labels[row, T - row % 3 - 1] = EOS
        labels[row, T - row % 3 :] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
