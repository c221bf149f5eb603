"""Who may attend to whom: padding, look-ahead and cross masks, as the chosen attention implementation reads them."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from .positions import count_positions
from .varlen import Sequences, find_sequences


# Shapes: B sources, g target rows per source, T target length of this call, S source length, D model width.
# A mask comes from the user as (B, S) or (B, T), true where there is a token, or as a finished 4-D mask: boolean (true
# where attention is allowed) or additive. Every 4-D mask is made additive with the lowest finite number, so that a row
# that may look nowhere stays finite. For "varlen" there are no masks but `Sequences`, which say the same.


def encoder_self_mask(config: PreTrainedConfig, embeds, attention_mask, segment_ids):
    """Every source position sees the real source positions; in packed rows, those of its own segment."""
    same = None if segment_ids is None else _same_segment(segment_ids, segment_ids)
    if attention_mask is not None and attention_mask.ndim == 4:
        return _restrict(_additive(config, attention_mask, embeds.dtype), same, embeds.shape[0], embeds.shape[1])
    if config._attn_implementation == "varlen":
        tokens = _tokens(embeds, embeds.shape[1], attention_mask, segment_ids)
        return find_sequences(*tokens, *tokens)
    return create_bidirectional_mask(config, embeds, attention_mask, and_mask_function=same)


def decoder_self_mask(
    config: PreTrainedConfig, embeds, attention_mask, past_key_values: EncoderDecoderCache | None, segment_ids
):
    """Every target position sees itself and the real ones before it; in packed rows, those of its own segment."""
    same = None if segment_ids is None else _same_segment(segment_ids, segment_ids)
    if attention_mask is not None and attention_mask.ndim == 4:
        return _restrict(_additive(config, attention_mask, embeds.dtype), same, embeds.shape[0], embeds.shape[1])
    cache = None if past_key_values is None else past_key_values.self_attention_cache
    if config._attn_implementation == "varlen":
        return _sequences_so_far(embeds, attention_mask, cache, segment_ids)
    return create_causal_mask(config, embeds, attention_mask, cache, and_mask_function=same)


def cross_mask(
    config: PreTrainedConfig,
    embeds: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cross_attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor | None,
    encoder_segment_ids: torch.Tensor | None,
):
    """
    Every target position sees the real source positions; with `attention_direction="unidirectional"` only those up to
    its own number. The g rows of a source are laid one after another: (B, 1, g * T, S).

    A 4-D source mask without a 4-D cross mask hides from the target what it hides from every source position.
    """
    sources, length = encoder_hidden_states.shape[0], embeds.shape[1]
    folded = embeds.reshape(sources, -1, embeds.shape[-1])  # (B, g * T, D)

    conditions = []
    if config.attention_direction == "unidirectional":
        rows = position_ids.expand(embeds.shape[:2]).reshape(sources, -1)  # (B, g * T)
        number = count_positions(encoder_hidden_states, attention_mask, encoder_segment_ids).expand(sources, -1)
        conditions.append(lambda b, h, q, s: number[b, s] <= rows[b, q])
    if segment_ids is not None:
        if encoder_segment_ids is None:
            raise ValueError("decoder_segment_ids are given without segment_ids: packed targets need packed sources.")
        conditions.append(_same_segment(segment_ids, encoder_segment_ids))
    elif (
        encoder_segment_ids is not None
        and not torch.compiler.is_compiling()
        and (encoder_segment_ids != encoder_segment_ids[:, :1]).any()
    ):
        raise ValueError(
            "segment_ids hold several segments in a row, but there are no decoder_segment_ids: packed sources need "
            "packed targets."
        )
    allowed = None if not conditions else lambda *at: torch.stack([condition(*at) for condition in conditions]).all(0)

    finished = None
    if cross_attention_mask is not None:
        finished = _additive(config, cross_attention_mask, embeds.dtype)
        if finished.shape[0] != sources:
            finished = finished.expand(-1, -1, length, -1)
            finished = finished.unflatten(0, (sources, -1)).transpose(1, 2).flatten(2, 3)
        elif finished.shape[2] != 1:
            finished = finished.repeat(1, 1, folded.shape[1] // length, 1)
    elif attention_mask is not None and attention_mask.ndim == 4:
        finished = _additive(config, attention_mask, embeds.dtype).amax(dim=2, keepdim=True)
    elif segment_ids is None and allowed is not None and config._attn_implementation in ("eager", "sdpa"):
        # create_bidirectional_mask would ask the condition for each pair of positions (vmap): in steps of decoding,
        # which have one position, that takes longer than all the layers.
        real = torch.ones_like(number) if attention_mask is None else attention_mask
        finished = _additive(config, real[:, None, None].bool(), embeds.dtype)
    if finished is not None:
        return _restrict(finished, allowed, sources, folded.shape[1])
    if config._attn_implementation == "varlen":
        segments = None if segment_ids is None else segment_ids.reshape(sources, -1)
        queries = _tokens(folded, folded.shape[1], None, segments)
        return find_sequences(
            *queries, *_tokens(folded, encoder_hidden_states.shape[1], attention_mask, encoder_segment_ids)
        )
    return create_bidirectional_mask(
        config, folded, attention_mask, encoder_hidden_states=encoder_hidden_states, and_mask_function=allowed
    )


def _tokens(embeds, length: int, attention_mask, segment_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment numbers (B, length), 0 where there are none, and which tokens are real (B, length)."""
    zeros = torch.zeros(embeds.shape[0], length, dtype=torch.long, device=embeds.device)
    segments = zeros if segment_ids is None else segment_ids.to(zeros.device)
    return segments, (zeros == 0) if attention_mask is None else attention_mask.to(zeros.device).bool()


def _sequences_so_far(embeds, attention_mask, cache, segment_ids) -> Sequences:
    """The last T of all target tokens, those in the cache among them, see what `varlen_attention` lets them see."""
    if cache is not None and cache.is_compileable:
        raise ValueError("attn_implementation 'varlen' needs a cache that can grow, not a static one: use 'sdpa'.")
    past, length = 0 if cache is None else cache.get_seq_length(), embeds.shape[1]
    if past and segment_ids is not None:
        raise ValueError("attn_implementation 'varlen' cannot continue packed targets from a cache: use one forward.")
    segments, real = _tokens(embeds, past + length, attention_mask, segment_ids)
    return find_sequences(segments[:, past:], real[:, past:], segments, real)


def _restrict(mask: torch.Tensor, allowed, rows: int, queries: int) -> torch.Tensor:
    """An additive mask (rows, 1, queries or 1, keys), closed where a condition on the indices does not hold."""
    if allowed is None:
        return mask
    row, query, key = (torch.arange(size, device=mask.device) for size in (rows, queries, mask.shape[-1]))
    open_here = allowed(row[:, None, None, None], 0, query[:, None], key)  # (rows, 1, queries, keys)
    return torch.where(open_here, mask, torch.finfo(mask.dtype).min)


def _same_segment(query_segments: torch.Tensor, key_segments: torch.Tensor):
    return lambda b, h, q, k: query_segments[b, q] == key_segments[b, k]


def _additive(config: PreTrainedConfig, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"4-D attention masks need attn_implementation 'eager' or 'sdpa', not {config._attn_implementation!r}."
        )
    lowest = torch.finfo(dtype).min
    if mask.is_floating_point():
        return mask.to(dtype).clamp(min=lowest)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.bool(), lowest)
