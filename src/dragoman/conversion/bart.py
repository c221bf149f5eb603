"""Marian, BART, mBART, Pegasus, BlenderBot and M2M100: one Transformer with its norms and positions in other places."""

from typing import Any

from dragoman.conversion.family import Family, one_rate


SAME_NAMES = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "max_position_embeddings",
    "activation_function",
    "scale_embedding",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "vocab_size",
    "use_cache",
)
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")  # not all of them have all

# What none of them leaves open.
ALWAYS = {
    "norm_type": "layernorm",
    "norm_eps": 1e-5,
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
}

POST_NORM = {"norm_position": "post", "final_norm": False}
PRE_NORM = {"norm_position": "pre", "final_norm": True}
LEARNED = {"position_embedding_type": "learned"}
SINUSOIDAL = {"position_embedding_type": "sinusoidal", "sinusoid_layout": "halves"}

MODULES = {
    "embed_positions": "embed_positions",
    "embedding_norm": "layernorm_embedding",
    "norm": "layer_norm",
    "layers.#.self_attn.q_proj": "layers.#.self_attn.q_proj",
    "layers.#.self_attn.k_proj": "layers.#.self_attn.k_proj",
    "layers.#.self_attn.v_proj": "layers.#.self_attn.v_proj",
    "layers.#.self_attn.o_proj": "layers.#.self_attn.out_proj",
    "layers.#.self_attn_norm": "layers.#.self_attn_layer_norm",
    "layers.#.cross_attn.q_proj": "layers.#.encoder_attn.q_proj",
    "layers.#.cross_attn.k_proj": "layers.#.encoder_attn.k_proj",
    "layers.#.cross_attn.v_proj": "layers.#.encoder_attn.v_proj",
    "layers.#.cross_attn.o_proj": "layers.#.encoder_attn.out_proj",
    "layers.#.cross_attn_norm": "layers.#.encoder_attn_layer_norm",
    "layers.#.mlp.up_proj": "layers.#.fc1",
    "layers.#.mlp.down_proj": "layers.#.fc2",
    "layers.#.mlp_norm": "layers.#.final_layer_norm",
}

UNUSED = (r"(encoder|decoder)\.version",)  # a number that fairseq wrote


def modules(theirs: dict[str, Any]) -> dict[str, str]:
    return MODULES


def settings_of(theirs: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {
        **{name: theirs[name] for name in SAME_NAMES},
        **{name: theirs.get(name) for name in SPECIAL_IDS},
        "layerdrop": one_rate(theirs, "encoder_layerdrop", "decoder_layerdrop"),
        **ALWAYS,
        **own,
    }


def marian(theirs: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(theirs, **POST_NORM, **SINUSOIDAL)
    if not theirs["share_encoder_decoder_embeddings"]:
        settings["source_vocab_size"] = theirs["vocab_size"]
        settings["vocab_size"] = theirs["decoder_vocab_size"]
    return settings


def bart(theirs: dict[str, Any]) -> dict[str, Any]:
    return settings_of(theirs, **POST_NORM, **LEARNED, embedding_norm=True)


def mbart(theirs: dict[str, Any]) -> dict[str, Any]:
    return settings_of(theirs, **PRE_NORM, **LEARNED, embedding_norm=True, rotate_labels=True)


def pegasus(theirs: dict[str, Any]) -> dict[str, Any]:
    return settings_of(theirs, **PRE_NORM, **SINUSOIDAL)


def blenderbot(theirs: dict[str, Any]) -> dict[str, Any]:
    return settings_of(theirs, **PRE_NORM, **LEARNED)


def m2m100(theirs: dict[str, Any]) -> dict[str, Any]:
    first = theirs["pad_token_id"] + 1
    return settings_of(theirs, **PRE_NORM, **SINUSOIDAL, sinusoid_endpoint=True, sinusoid_offset=first)


MARIAN = Family(marian, modules, UNUSED, stores_sinusoids=True)
BART = Family(bart, modules, UNUSED, position_rows_before_first=2)
MBART = Family(mbart, modules, UNUSED, position_rows_before_first=2)
PEGASUS = Family(pegasus, modules, UNUSED, stores_sinusoids=True)
BLENDERBOT = Family(blenderbot, modules, UNUSED)
# M2M100 computes its sinusoids anew, whatever a checkpoint holds.
M2M100 = Family(m2m100, modules, (*UNUSED, r"(encoder|decoder)\.embed_positions\.weights"))
