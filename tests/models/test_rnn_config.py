"""Recurrent configurations that contradict themselves are refused where they are written, and the surface is frozen."""

import re
from dataclasses import fields

import pytest
from transformers import AutoConfig, PreTrainedConfig

from conftest import D, rnn
from dragoman import DragomanRnnConfig


ATTENTIONS = "additive, dot, general, scaled_dot"
REFUSED = [
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1."),
    ({"hidden_size": 0}, "hidden_size=0 must be at least 1."),
    ({"max_target_length": 0}, "max_target_length=0 must be at least 2"),
    ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1."),
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must be at least 0 and less than 1."),
    ({"teacher_forcing_ratio": 1.5}, "teacher_forcing_ratio=1.5 must be between 0 and 1."),
    ({"init_std": 0.0}, "init_std=0.0 must be positive"),
    ({"source_vocab_size": 31}, "share_embeddings=True needs one vocabulary, but source_vocab_size=31"),
    ({"source_vocab_size": 0, "share_embeddings": False}, "source_vocab_size=0 must be at least 1."),
    ({"tie_lm_head": True}, f"embedding_dim=9 and hidden_size={D}: set tie_lm_head=False, or make them equal."),
    ({"hidden_size": 13}, "hidden_size=13 is odd, but bidirectional_encoder=True"),
    ({"reverse_source": True}, "reverse_source=True has no meaning with bidirectional_encoder=True"),
    ({"reverse_source": True, "bidirectional_encoder": False, "attention_direction": "unidirectional"},
     "set reverse_source=False, or attention_direction='bidirectional'."),
    ({"attention": "none", "attention_direction": "unidirectional"},
     f"needs an attention, but attention='none': choose one of {ATTENTIONS}, context_as_state, or"),
    ({"attention": "none", "input_feeding": True}, f"but attention='none': choose one of {ATTENTIONS}, or"),
    ({"attention": "context_as_state", "encoder_layers": 3},
     "encoder_layers=3 and decoder_layers=2: make them equal."),
    ({"attention": "context_as_state", "context_every_step": True},
     "context_every_step=True contradicts attention='context_as_state'"),
    ({"attention": "context_as_state", "input_feeding": True},
     "input_feeding=True contradicts attention='context_as_state'"),
    ({"context_scaling": "hidden_size"},
     "context_scaling='hidden_size' belongs to attention='context_as_state', not to attention='general'"),
    ({"input_feeding": True, "context_every_step": True}, "input_feeding=True needs attention after the step"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_impossible_values_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        rnn("impossible", **settings).config()


@pytest.mark.parametrize(
    ("name", "value"), [("cell", "sru"), ("attention", "bilinear"), ("hidden_size", "12"), ("dropout", None)]
)
def test_wrong_types_and_words_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        rnn("wrong", **{name: value}).config()


def test_defaults_make_a_model():
    config = DragomanRnnConfig()
    assert config.tie_lm_head
    assert config.embedding_dim == config.hidden_size
    assert config.num_hidden_layers == config.decoder_layers


def test_a_side_can_be_asked_for():
    config = rnn("sides", encoder_layers=3, decoder_layers=1).config()
    assert config.get_text_config(decoder=True).num_hidden_layers == 1
    for side in ({"decoder": True}, {"encoder": True}):
        copy = config.get_text_config(**side)
        assert (copy.vocab_size, copy.hidden_size, copy.embedding_dim) == (23, D, 9)


def test_a_saved_configuration_comes_back(tmp_path):
    config = rnn("saved", attention="additive", teacher_forcing_ratio=0.5).config()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_surface():
    """A change here is a decision: add the option's test and its line in the README too."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    assert {field.name for field in fields(DragomanRnnConfig)} - inherited == {
        "attention",
        "attention_direction",
        "bidirectional_encoder",
        "bos_token_id",
        "cell",
        "context_every_step",
        "context_scaling",
        "decoder_layers",
        "decoder_start_token_id",
        "dropout",
        "embedding_dim",
        "encoder_layers",
        "eos_token_id",
        "hidden_size",
        "init_std",
        "input_feeding",
        "label_smoothing",
        "lm_head_bias",
        "max_target_length",
        "pad_token_id",
        "reverse_source",
        "share_embeddings",
        "source_vocab_size",
        "teacher_forcing_coin",
        "teacher_forcing_feedback",
        "teacher_forcing_ratio",
        "tie_lm_head",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
