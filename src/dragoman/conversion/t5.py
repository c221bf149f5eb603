"""T5, T5 v1.1, FLAN-T5 and mT5: relative biases, RMSNorm, no other biases, and scores that are not scaled."""

from typing import Any

from dragoman.conversion.family import Family


ATTENTION = {
    "relative_bias.weight": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "norm": "final_layer_norm",
    "layers.#.self_attn.q_proj": "block.#.layer.0.SelfAttention.q",
    "layers.#.self_attn.k_proj": "block.#.layer.0.SelfAttention.k",
    "layers.#.self_attn.v_proj": "block.#.layer.0.SelfAttention.v",
    "layers.#.self_attn.o_proj": "block.#.layer.0.SelfAttention.o",
    "layers.#.self_attn_norm": "block.#.layer.0.layer_norm",
    "layers.#.cross_attn.q_proj": "block.#.layer.1.EncDecAttention.q",
    "layers.#.cross_attn.k_proj": "block.#.layer.1.EncDecAttention.k",
    "layers.#.cross_attn.v_proj": "block.#.layer.1.EncDecAttention.v",
    "layers.#.cross_attn.o_proj": "block.#.layer.1.EncDecAttention.o",
    "layers.#.cross_attn_norm": "block.#.layer.1.layer_norm",
}
PLAIN_MLP = {
    "encoder.layers.#.mlp.up_proj": "block.#.layer.1.DenseReluDense.wi",
    "encoder.layers.#.mlp.down_proj": "block.#.layer.1.DenseReluDense.wo",
    "encoder.layers.#.mlp_norm": "block.#.layer.1.layer_norm",
    "decoder.layers.#.mlp.up_proj": "block.#.layer.2.DenseReluDense.wi",
    "decoder.layers.#.mlp.down_proj": "block.#.layer.2.DenseReluDense.wo",
    "decoder.layers.#.mlp_norm": "block.#.layer.2.layer_norm",
}
GATED_MLP = {
    **PLAIN_MLP,
    "encoder.layers.#.mlp.gate_proj": "block.#.layer.1.DenseReluDense.wi_0",
    "encoder.layers.#.mlp.up_proj": "block.#.layer.1.DenseReluDense.wi_1",
    "decoder.layers.#.mlp.gate_proj": "block.#.layer.2.DenseReluDense.wi_0",
    "decoder.layers.#.mlp.up_proj": "block.#.layer.2.DenseReluDense.wi_1",
}

# Early checkpoints hold biases of cross-attention, which has none.
UNUSED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def modules(theirs: dict[str, Any]) -> dict[str, str]:
    return {**ATTENTION, **(GATED_MLP if theirs["is_gated_act"] else PLAIN_MLP)}


def mt5(theirs: dict[str, Any]) -> dict[str, Any]:
    heads, width, inner, dropout = (theirs[name] for name in ("num_heads", "d_kv", "d_ff", "dropout_rate"))
    return {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["d_model"],
        "encoder_layers": theirs["num_layers"],
        "decoder_layers": theirs["num_decoder_layers"],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_head_dim": width,
        "decoder_head_dim": width,
        "encoder_ffn_dim": inner,
        "decoder_ffn_dim": inner,
        "max_position_embeddings": theirs.get("n_positions", 512),  # no limit: where generate() gives up
        "norm_type": "rmsnorm",
        "norm_position": "pre",
        "final_norm": True,
        "norm_eps": theirs["layer_norm_epsilon"],
        "activation_function": theirs["dense_act_fn"],
        "gated_mlp": theirs["is_gated_act"],
        "attention_bias": False,
        "mlp_bias": False,
        "attention_scaling": 1.0,
        "position_embedding_type": "relative",
        "relative_num_buckets": theirs["relative_attention_num_buckets"],
        "relative_max_distance": theirs["relative_attention_max_distance"],
        "scale_embedding": False,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
        "final_dropout": dropout,
        "bos_token_id": theirs.get("bos_token_id"),
        "pad_token_id": theirs["pad_token_id"],
        "eos_token_id": theirs["eos_token_id"],
        "decoder_start_token_id": theirs.get("decoder_start_token_id"),
        "use_cache": theirs["use_cache"],
    }


def t5(theirs: dict[str, Any]) -> dict[str, Any]:
    # True for the first T5, which ties its output layer. Whether a checkpoint ties it is another question: see its
    # weights. The field of that name in a config.json says False for v1.1 and FLAN-T5, and means this scaling.
    scale = theirs["d_model"] ** -0.5 if theirs["scale_decoder_outputs"] else None
    return {**mt5(theirs), "logit_scale": scale}


T5 = Family(t5, modules, UNUSED)
MT5 = Family(mt5, modules, UNUSED)
