"""Multi-head attention of the Transformer family: within a sequence, and from the target to the source."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fast_linear import Linear
from .positions import leave, rotate
from .varlen import varlen_attention


# Shapes: B batch, T queries, S (or K) keys, D model width, H query heads, G key and value heads, d head width.


def eager_attention(
    module: "DragomanAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    softmax(Q K^T * scaling + bias + mask) V (Vaswani 2017, equation 1), step by step, keeping the weights.

    Args:
        query: `(B, H, T, d)`; key, value: `(B, G, K, d)`, each serving H / G query heads.
        attention_mask: `(B, 1, T, K)`, added to the scores; position_bias: `(1, H, T, K)`, too.
        kwargs: what other implementations of this interface need.

    Returns:
        output `(B, T, H, d)` and weights `(B, H, T, K)`.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    # Half precision is too coarse for the sum of exponentials over a long row.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register("varlen", varlen_attention)


class ScaledQuery(Linear):
    """
    The projection to queries under an `attention_scaling` of one's own. Its initial weights are multiplied by `gain`,
    so that the scores begin as large as under the usual scaling.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, gain: float):
        super().__init__(in_features, out_features, bias)
        self.gain = gain


class DragomanAttention(nn.Module):
    """Projections and head sizes that self- and cross-attention share."""

    def __init__(self, config, side: str, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        heads = getattr(config, f"{side}_attention_heads")
        groups = getattr(config, f"{side}_num_key_value_heads")
        self.head_dim = getattr(config, f"{side}_head_dim")
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        self.q_proj = Linear(config.d_model, heads * self.head_dim, bias=config.attention_bias)
        if config.attention_scaling is not None:
            gain = self.scaling / config.attention_scaling
            self.scaling = config.attention_scaling
            self.q_proj = ScaledQuery(config.d_model, heads * self.head_dim, config.attention_bias, gain)
        self.k_proj = Linear(config.d_model, groups * self.head_dim, bias=config.attention_bias)
        self.v_proj = Linear(config.d_model, groups * self.head_dim, bias=config.attention_bias)
        self.o_proj = Linear(heads * self.head_dim, config.d_model, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * d) -> (B, heads, T, d); the head count is read off, since tensor parallelism divides it."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, H, T, d) and two (B, G, K, d) -> (B, T, H, d) and, from the eager implementation, weights (B, H, T, K)"""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if self.config._attn_implementation == "varlen":  # which code that comes with a checkpoint registers, too
            attention = varlen_attention
        return attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal and attention_mask is None and query.shape[2] > 1,
            **kwargs,
        )


class DragomanSelfAttention(DragomanAttention):
    """Each position attends to its own sequence: all of it in the encoder, what came before in the decoder."""

    def __init__(self, config, side: str, layer_idx: int, is_causal: bool):
        super().__init__(config, side, layer_idx, is_causal)
        self.turn: Callable = rotate if config.position_embedding_type == "rotary" else leave

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D) and the weights (B, H, T, K) or None"""
        query = self.q_norm(self.split_heads(self.q_proj(hidden_states)))
        key = self.k_norm(self.split_heads(self.k_proj(hidden_states)))
        value = self.split_heads(self.v_proj(hidden_states))
        query, key = self.turn(query, key, rotary_angles)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class DragomanCrossAttention(DragomanAttention):
    """
    Each target position attends to the source: queries from the decoder, keys and values from the encoder.

    The decoder may hold g rows (beams, candidates) per source. They share the source's keys and values: the queries of
    a source's rows are laid one after another, and the shapes tell g.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, "decoder", layer_idx, is_causal=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B * g, T, D), source (B, S, D), mask (B, 1, g * T, S) -> (B * g, T, D), weights (B * g, H, T, S) or None"""
        key, value = self.keys_and_values(encoder_hidden_states, past_key_values)
        rows, length, _ = hidden_states.shape
        folded = hidden_states.reshape(key.shape[0], -1, hidden_states.shape[-1])  # (B, g * T, D)
        query = self.q_norm(self.split_heads(self.q_proj(folded)))
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        if weights is not None and rows != key.shape[0]:
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return self.o_proj(output.flatten(2)).view(rows, length, -1), weights

    def keys_and_values(self, encoder_hidden_states: torch.Tensor, past_key_values: EncoderDecoderCache | None):
        """Two (B, G, S, d), projected once per source and then taken from the cache."""
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer: Any = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key = self.k_norm(self.split_heads(self.k_proj(encoder_hidden_states)))
        value = self.split_heads(self.v_proj(encoder_hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value
