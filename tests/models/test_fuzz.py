"""
Any configuration is refused with a sentence that names the field, or makes a model that does everything.

`pytest tests/models/test_fuzz.py --hypothesis-profile=thorough` tries thousands of others.
"""

import math
import tempfile
from dataclasses import fields
from typing import get_args

import torch
from hypothesis import event, given, note
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM

from conftest import RNN_SIZES, TRANSFORMER_SIZES
from dragoman import (
    DragomanConfig,
    DragomanForConditionalGeneration,
    DragomanRnnConfig,
    DragomanRnnForConditionalGeneration,
)


STRATEGIES = (
    {"num_beams": 1},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "num_beams": 2},
    {"penalty_alpha": 0.6, "top_k": 3},
)
SPECIAL = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
ODD_VALUES = (None, True, 0, 1, -1, 3, 10**4, 0.0, 0.5, 1.0, -0.1, math.nan, math.inf, "none", "12", [2, 3], [], {})

chance = st.sampled_from([0.0, 0, 0.1, 0.5])
layers = st.integers(1, 2)
ids = {name: st.integers(0, 5) for name in SPECIAL}
ends = {
    "vocab_size": st.integers(6, 23),
    "source_vocab_size": st.none() | st.integers(6, 23),
    "share_embeddings": st.booleans(),
    "tie_lm_head": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "lm_head_bias": st.booleans(),
    "label_smoothing": chance,
    "init_std": st.sampled_from([None, 0.02]),
    "use_cache": st.booleans(),
}


def literals(config_class: type, *names: str) -> dict[str, st.SearchStrategy]:
    """The fields that take one of a few words."""
    annotations = {field.name: field.type for field in fields(config_class)}
    return {name: st.sampled_from(get_args(annotations[name])) for name in names}


TRANSFORMER = {
    **ends,
    **ids,
    **literals(
        DragomanConfig,
        "norm_type",
        "norm_position",
        "attention_direction",
        "position_embedding_type",
        "sinusoid_layout",
    ),
    **{f"{side}_layers": layers for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": st.sampled_from([1, 2, 3, 4]) for side in ("encoder", "decoder")},
    **{f"{side}_num_key_value_heads": st.sampled_from([None, 1, 2]) for side in ("encoder", "decoder")},
    **{f"{side}_head_dim": st.sampled_from([None, 2, 4, 5]) for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": st.integers(1, 9) for side in ("encoder", "decoder")},
    **{f"{name}dropout": chance for name in ("", "attention_", "activation_", "final_")},
    **{name: st.booleans() for name in ("embedding_norm", "final_norm", "gated_mlp", "attention_bias", "mlp_bias")},
    **{name: st.booleans() for name in ("qk_norm", "sinusoid_endpoint", "scale_embedding", "rotate_labels")},
    "d_model": st.sampled_from([4, 8, 9, 12]),
    "max_position_embeddings": st.integers(1, 12),
    "norm_eps": st.sampled_from([1e-6, 0.1]),
    "activation_function": st.sampled_from(["silu", "gelu", "relu", "quick_gelu", "tanh"]),
    "attention_scaling": st.sampled_from([None, 1.0, 0.3]),
    "logit_scale": st.sampled_from([None, 2.0, 0.3]),
    "sinusoid_offset": st.integers(0, 2),
    "rope_parameters": st.sampled_from(
        [
            None,
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
            {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 8},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 0},
            {"rope_type": "linear"},
            {"rope_type": "longrope", "factor": 2.0},
            {"rope_type": "none"},
            {"partial_rotary_factor": 0.5},
            {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
            {"rope_theta": -1.0},
            {"rope_theta": "x"},
            {"rope_theta": 500.0},
            {},
        ]
    ),
    "relative_num_buckets": st.integers(2, 9),
    "relative_max_distance": st.integers(1, 12),
    "layerdrop": chance,
}
RNN = {
    **ends,
    **ids,
    **literals(
        DragomanRnnConfig,
        "cell",
        "attention",
        "attention_direction",
        "context_scaling",
        "teacher_forcing_coin",
        "teacher_forcing_feedback",
    ),
    **{f"{side}_layers": layers for side in ("encoder", "decoder")},
    **{name: st.booleans() for name in ("bidirectional_encoder", "reverse_source")},
    **{name: st.booleans() for name in ("context_every_step", "input_feeding")},
    "embedding_dim": st.sampled_from([5, 8]),
    "hidden_size": st.sampled_from([7, 8]),
    "max_target_length": st.integers(1, 9),
    "teacher_forcing_ratio": st.sampled_from([1.0, 1, 0.5, 0]),
    "dropout": chance,
}


def reconcile(config_class: type, sizes: dict, drawn: dict) -> dict:
    """`drawn` without fields that a refusal blames: what fits together by chance is little."""
    while True:
        try:
            config_class(**{**sizes, **drawn})
            return drawn
        except ValueError as refusal:
            blamed = [name for name in drawn if name in str(refusal)]
            if not blamed:
                return drawn
            drawn = {name: value for name, value in drawn.items() if name != blamed[-1]}


def configurations(config_class: type, space: dict[str, st.SearchStrategy], sizes: dict) -> st.SearchStrategy:
    """Small sizes and some fields drawn to fit their meaning, mostly each other too; now and then one from anywhere."""

    def settings(drawn: dict, fitting: bool, odd: dict) -> dict:
        return {**sizes, **(reconcile(config_class, sizes, drawn) if fitting else drawn), **odd}

    drawn = st.lists(st.sampled_from(sorted(space)), max_size=20, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: space[name] for name in names})
    )
    odd = st.dictionaries(st.sampled_from(sorted(space)), st.sampled_from(ODD_VALUES), max_size=1)
    return st.builds(settings, drawn, st.sampled_from([True, True, True, False]), st.just({}) | odd)


def check(config_class: type, model_class: type, settings: dict):
    note(repr(settings))
    config = refusal = None
    try:
        config = config_class(**settings)
    except ValueError as error:
        refusal = str(error)
    event("refused" if config is None else "constructed")
    if config is None:
        named = {field.name for field in fields(config_class) if field.name in refusal}
        assert named & set(settings), f"refused, but which field is at fault? {refusal}"
        return

    torch.manual_seed(0)
    model = model_class(config).to(torch.float64)
    length = 7
    if isinstance(config, DragomanConfig) and config.position_embedding_type == "learned":
        length = min(length, config.max_position_embeddings)
    source = torch.randint(0, config.source_vocab_size or config.vocab_size, (2, length))
    labels = torch.randint(0, config.vocab_size, (2, max(1, length - 2)))
    labels[1, -1:] = -100
    mask = torch.ones_like(source)
    mask[1, 1:] = length < 2

    loss = model.train()(source, mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name

    model.eval()
    limit = min(length, model.generation_config.max_length)
    for strategy in STRATEGIES:
        output = model.generate(source, attention_mask=mask, max_length=limit, **strategy)
        assert output.shape[0] == 2 * strategy.get("num_return_sequences", 1)
        assert output.shape[1] <= limit
        assert output.min() >= 0
        assert output.max() < config.vocab_size

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert again.config.to_diff_dict() == config.to_diff_dict()
        expected = model(source, mask, labels=labels).logits
        torch.testing.assert_close(again(source, mask, labels=labels).logits, expected, rtol=0, atol=1e-12)


@given(configurations(DragomanConfig, TRANSFORMER, TRANSFORMER_SIZES))
def test_transformer_configurations(settings):
    check(DragomanConfig, DragomanForConditionalGeneration, settings)


@given(configurations(DragomanRnnConfig, RNN, RNN_SIZES))
def test_rnn_configurations(settings):
    check(DragomanRnnConfig, DragomanRnnForConditionalGeneration, settings)


def test_every_field_is_drawn():
    """A new field has to join."""
    inherited = {field.name for field in fields(DragomanConfig.__mro__[1])} | {"is_encoder_decoder"}
    for config_class, space in ((DragomanConfig, TRANSFORMER), (DragomanRnnConfig, RNN)):
        own = {field.name for field in fields(config_class)} - (inherited - {*ends, *ids})
        assert own == set(space)
