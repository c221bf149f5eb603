"""Configurations that make no model are refused where they are written, with a sentence that helps."""

import re

import pytest

from conftest import V, family, transformer
from dragoman import DragomanConfig


REFUSED = [
    ({"encoder_attention_heads": 5}, "encoder_attention_heads=5 does not divide d_model=12"),
    ({"decoder_attention_heads": 0}, "decoder_attention_heads=0 does not divide d_model=12"),
    ({"decoder_head_dim": 4, "decoder_attention_heads": 6, "decoder_num_key_value_heads": 4},
     "decoder_num_key_value_heads=4 does not divide decoder_attention_heads=6"),
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ({"encoder_layers": 0}, "encoder_layers=0 must be at least 1"),
    ({"final_dropout": 1.0}, "final_dropout=1.0 must be at least 0 and less than 1"),
    ({"sinusoid_offset": -1, "position_embedding_type": "sinusoidal"}, "sinusoid_offset=-1 must be at least 0"),
    ({"sinusoid_offset": 2}, "sinusoid_offset=2 needs position_embedding_type='sinusoidal', not 'rotary'"),
    ({"sinusoid_endpoint": True, "position_embedding_type": "learned"},
     "sinusoid_endpoint=True needs position_embedding_type='sinusoidal', not 'learned'"),
    ({"d_model": 2, "position_embedding_type": "sinusoidal", "sinusoid_endpoint": True},
     "d_model=2 must be at least 4 for sinusoid_endpoint=True"),
    ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must be at least 0 and less than 1"),
    ({"activation_function": "swoosh"}, "activation_function='swoosh' is unknown: choose one of"),
    ({"source_vocab_size": 31}, "share_embeddings=True needs one vocabulary, but source_vocab_size=31 and"),
    ({"source_vocab_size": 0, "share_embeddings": False}, "source_vocab_size=0 must be at least 1"),
    ({"encoder_head_dim": 3}, "encoder_head_dim=3 is odd"),
    ({"d_model": 9, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
      "position_embedding_type": "sinusoidal"}, "d_model=9 is odd"),
    ({"position_embedding_type": "relative", "relative_num_buckets": 5}, "relative_num_buckets=5 must be even"),
    ({"position_embedding_type": "relative", "relative_max_distance": 16}, "relative_max_distance=16 must exceed half"),
    ({"sinusoid_layout": "halves"}, "sinusoid_layout='halves' needs position_embedding_type='sinusoidal'"),
    ({"relative_num_buckets": 16}, "relative_num_buckets=16 needs position_embedding_type='relative', not 'rotary'"),
    ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 10000.0}}, "rope_type='bogus' in rope_parameters is"),
    ({"init_std": 0.0}, "init_std=0.0 must be positive"),
    ({"attention_scaling": 0.0}, "attention_scaling=0.0 must be positive"),
    ({"logit_scale": -1.0}, "logit_scale=-1.0 must be positive"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_impossible_values_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        transformer("impossible", **settings).config()


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_type", "batchnorm"), ("position_embedding_type", "learnt"), ("d_model", "12"), ("dropout", None)],
)
def test_wrong_types_and_words_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        transformer("wrong", **{name: value}).config()


def test_what_is_left_out_is_derived():
    config = DragomanConfig(d_model=48, encoder_attention_heads=4, decoder_attention_heads=6)
    assert (config.encoder_head_dim, config.decoder_head_dim) == (12, 8)
    assert (config.encoder_num_key_value_heads, config.decoder_num_key_value_heads) == (4, 6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 6, 6)


def test_only_rotary_positions_need_even_heads():
    assert transformer("odd", position_embedding_type="relative", decoder_head_dim=5).config().head_dim == 5


def test_a_side_can_be_asked_for():
    """`generate()` sizes caches from this copy."""
    config = transformer("sides", encoder_layers=3, decoder_layers=2, decoder_head_dim=10).config()
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config(encoder=True).num_hidden_layers == 3
    assert config.get_text_config(decoder=True).head_dim == 10
    assert config.get_text_config(encoder=True).head_dim == 6
    assert config.get_text_config(decoder=True).vocab_size == V
    assert family("prenorm").config().get_text_config(encoder=True).vocab_size == V


def test_round_trip(any_family, tmp_path):
    config = any_family.config()
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert {**again.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}
