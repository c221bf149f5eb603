"""How a Transformer knows the order of its tokens: four mechanisms, each a module of its own."""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


# Shapes: B batch, T positions asked for, K keys, H heads, D model width, d head width.


def count_positions(embeds, attention_mask=None, segment_ids=None, past_length=0) -> torch.Tensor:
    """
    The number of each token in its sequence, (B, T) or (1, T): padding on either side is not counted, and every
    segment of a packed row begins anew.

    Args:
        embeds (B, T, D): gives length and device; attention_mask (B, past + T); segment_ids (B, T).
    """
    length = embeds.shape[1]
    count = torch.arange(length, device=embeds.device)[None] + past_length
    if attention_mask is not None and attention_mask.ndim == 2:
        count = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    if segment_ids is not None:
        begins = nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
        count = count - (begins * count).cummax(dim=1).values
    return count


class SinusoidalPositions(nn.Module):
    """
    Fixed sine and cosine waves, added to the embeddings (Vaswani 2017, section 3.5). Computed where they are needed,
    so there is no longest sequence.

    `interleaved` puts the sine and cosine of one frequency side by side, as in the paper's formula; `halves` puts all
    sines before all cosines, as in Marian. The D/2 frequencies fall from 1 towards 1/10000, which only `endpoint`
    reaches. `offset` is the number of the first position.
    """

    def __init__(self, d_model: int, layout: str, endpoint: bool = False, offset: int = 0):
        super().__init__()
        self.waves = d_model // 2
        self.steps = self.waves - 1 if endpoint else self.waves
        self.offset = offset
        self.join = {"interleaved": self._interleave, "halves": self._concatenate}[layout]

    @staticmethod
    def _interleave(sine: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        return torch.stack((sine, cosine), dim=-1).flatten(-2)

    @staticmethod
    def _concatenate(sine: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        return torch.cat((sine, cosine), dim=-1)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`position_ids` (B, T) -> (B, T, D)"""
        precision = torch.promote_types(dtype, torch.float32)
        wave = torch.arange(self.waves, device=position_ids.device, dtype=precision)
        frequency = torch.exp(wave * (-math.log(10000.0) / self.steps))
        angle = (position_ids + self.offset)[..., None].to(precision) * frequency  # (B, T, D/2)
        return self.join(angle.sin(), angle.cos()).to(dtype)


class LearnedPositions(nn.Embedding):
    """A trained vector for each position, added to the embeddings (Gehring 2017). Its table ends somewhere."""

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`position_ids` (B, T) -> (B, T, D)"""
        return super().forward(position_ids).to(dtype)


class DragomanRotaryEmbedding(nn.Module):
    """
    The angles by which queries and keys are turned, so that their product depends on the distance between them
    (Su 2021, equation 34). All `rope_type`s of Transformers are understood.

    Args:
        config: gives `head_dim`, `rope_parameters` and `max_position_embeddings` of one stack.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        # Names that Transformers reads: it restores the frequencies after loading, and rescales them for long inputs.
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.compute_frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        frequencies, self.attention_scaling = self.compute_frequencies(config)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)
        self.original_inv_freq = nn.Buffer(frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, device=None, **_) -> tuple[torch.Tensor, float]:
        """Frequencies (d/2,) and the factor on sine and cosine, which is 1 for the original rotation."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` (B, T) -> cosine and sine, each (B, T, d), in the dtype of `x`"""
        precision = torch.promote_types(x.dtype, torch.float32)
        angle = position_ids[:, :, None].to(precision) * self.inv_freq.to(x.device, precision)
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * self.attention_scaling).to(x.dtype), (angle.sin() * self.attention_scaling).to(x.dtype)


def rotate(query: torch.Tensor, key: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]):
    """Turns queries (B, H, T, d) and keys (B, H', T, d); dimension i is paired with i + d/2."""
    cosine, sine = angles[0][:, None], angles[1][:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    return turn(query), turn(key)


def leave(query: torch.Tensor, key: torch.Tensor, angles: None):
    """What every position type but the rotary one does to queries and keys."""
    return query, key


class RelativePositionBias(nn.Module):
    """
    A trained number per head and bucketed distance, added to the scores of every layer (Raffel 2020, section 2.1):
    small distances have a bucket each, larger ones share logarithmically wider ones, `max_distance` and beyond one.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Embedding(num_buckets, num_heads)

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """`distance` = key position - query position -> bucket number, same shape"""
        num_buckets = self.num_buckets
        offset = torch.zeros_like(distance)
        if self.bidirectional:  # half of the buckets for keys after the query
            num_buckets //= 2
            offset = (distance > 0).long() * num_buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = num_buckets // 2
        wide = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + wide * (num_buckets - exact)).long().clamp(max=num_buckets - 1)
        return offset + torch.where(distance < exact, distance, wide)

    def forward(self, query_position: torch.Tensor, num_keys: int) -> torch.Tensor:
        """`query_position` (T,) -> bias (1, H, T, K)"""
        key_position = torch.arange(num_keys, device=query_position.device)
        return self.weight(self.buckets(key_position - query_position[:, None])).permute(2, 0, 1)[None]
