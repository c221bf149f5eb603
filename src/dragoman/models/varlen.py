"""
`attn_implementation="varlen"`: flash attention (Dao 2024) over the real tokens alone, which lie one sequence after
another, whether they come from padded rows or from packed ones. The kernels are those of torch: a GPU, bf16 or fp16.

Transformers' own flash path takes one set of lengths for every attention of a forward pass. Here encoder, decoder and
cross-attention have a set each, made once per forward in the place of a mask.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn


# Shapes: B rows, T queries and K keys of a row, H query heads, G key and value heads, d head width; N sequences, Q
# queries and R keys that are in one of them.


class Sequences(NamedTuple):
    """
    Which tokens attend to which: the queries of sequence n to the keys of sequence n.

    Attributes:
        queries (Q,), keys (R,): where they stand among all B * T and B * K, sequence after sequence.
        query_starts, key_starts (N + 1,): where a sequence begins in `queries` and `keys`, and the ends.
        longest_query, longest_key: tokens of the longest sequence.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


def find_sequences(
    query_segments: torch.Tensor, real_queries: torch.Tensor, key_segments: torch.Tensor, real_keys: torch.Tensor
) -> Sequences:
    """
    Tokens of one row with one segment number are a sequence.

    Args:
        query_segments (B, T), key_segments (B, K): segment numbers, the same for all tokens of an unpacked row.
        real_queries (B, T), real_keys (B, K): true where there is a token. Queries of segments without a real key are
            left out, as are keys without a query.

    Raises:
        ValueError: nothing is left.
    """
    rows, length = query_segments.shape
    segments = torch.cat((query_segments, key_segments), dim=1)
    segments = segments - segments.min()
    first = torch.arange(rows, device=segments.device)[:, None] * (segments.max() + 1)
    distinct, numbers = (first + segments).unique(return_inverse=True)
    query_numbers, key_numbers = numbers[:, :length].flatten(), numbers[:, length:].flatten()
    real_queries, real_keys = real_queries.flatten(), real_keys.flatten()
    query_counts = query_numbers[real_queries].bincount(minlength=len(distinct))
    key_counts = key_numbers[real_keys].bincount(minlength=len(distinct))
    kept = (query_counts > 0) & (key_counts > 0)
    if not kept.any():
        raise ValueError("attn_implementation 'varlen' got a batch in which no token has a real token to attend to.")

    def order(numbers: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        tokens = (real & kept[numbers]).nonzero()[:, 0]
        return tokens[numbers[tokens].argsort(stable=True)]

    def starts(counts: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(counts.cumsum(dim=0), (1, 0)).int()

    query_counts, key_counts = query_counts[kept], key_counts[kept]
    return Sequences(
        order(query_numbers, real_queries),
        order(key_numbers, real_keys),
        starts(query_counts),
        starts(key_counts),
        int(query_counts.max()),
        int(key_counts.max()),
    )


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Sequences | None,
    scaling: float,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The interface of `eager_attention`, with `Sequences` for a mask. In the decoder the last query of a sequence sees
    all of its keys, the one before it one less, and so on, so that it does not matter how many of the keys are new.

    Args:
        query: `(B, H, T, d)`; key, value: `(B, G, K, d)`, each serving H / G query heads.

    Returns:
        output `(B, T, H, d)`, zero for queries that are in no sequence, and None.

    Raises:
        ValueError: what these kernels cannot do (`check_settings`, `check_kernel`); attention weights; a model of
            another family.
    """
    if not isinstance(attention_mask, tuple):
        raise ValueError("attn_implementation 'varlen' is for Dragoman's Transformers: use 'sdpa'.")
    if output_attentions:
        raise ValueError("attn_implementation 'varlen' has no attention weights to show: use 'eager'.")
    check_settings(module.config, module.training)
    sequences = attention_mask
    rows, heads, length, width = query.shape
    kind = query.device.type
    # As `scaled_dot_product_attention` does: normalized or rotated queries and keys may be in single precision.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    check_kernel(kind, dtype, width)

    def take(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(B, heads, L, d) -> (tokens, heads, d)"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, tokens).to(dtype)

    output: Any = varlen_attn(  # a pair, were the sums of the scores asked for
        take(query, sequences.queries),
        take(key, sequences.keys),
        take(value, sequences.keys),
        sequences.query_starts,
        sequences.key_starts,
        sequences.longest_query,
        sequences.longest_key,
        scale=scaling,
        window_size=(-1, 0) if module.is_causal else (-1, -1),
        enable_gqa=heads != key.shape[1],
    )
    spread = output.new_zeros(rows * length, heads, width).index_copy(0, sequences.queries, output)
    return spread.view(rows, length, heads, width), None


def check_settings(config, training: bool):
    """
    Raises:
        ValueError: the configuration has what the kernels have not.
    """
    for unknown, name in (
        (config.position_embedding_type == "relative", "position_embedding_type='relative'"),
        (config.attention_direction == "unidirectional", "attention_direction='unidirectional'"),
        (training and config.attention_dropout > 0, f"attention_dropout={config.attention_dropout}"),
    ):
        if unknown:
            raise ValueError(f"attn_implementation 'varlen' cannot do {name}: use 'sdpa' or 'eager'.")


def check_kernel(device: str, dtype: torch.dtype, head_dim: int):
    """
    Raises:
        ValueError: the kernels take no tensors of this kind of device, precision and head width, or this torch has no
            kernels for heads that share keys.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        found = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise ValueError(f"attn_implementation 'varlen' needs a GPU and bfloat16 or float16, not {found}: use 'sdpa'.")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            "attn_implementation 'varlen' needs heads whose width is a multiple of 8 and at most 256, not "
            f"{head_dim}: use 'sdpa'."
        )
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        raise ValueError(f"attn_implementation 'varlen' needs torch 2.12, not {torch.__version__}: use 'sdpa'.")
