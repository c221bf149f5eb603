"""Attention of a recurrent decoder to the source, and the ways in which it enters a step."""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_dragoman_rnn import DragomanRnnConfig
from .fast_linear import Linear


# Shapes: B sources, g target rows per source (beams), T target steps of this call, S source length, L layers,
# E embedding width, D hidden size. A recurrent state is a tuple of tensors (L, B * g, D): h, and c of an LSTM.

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make_rnn(config: DragomanRnnConfig, input_size: int, hidden_size: int, layers: int, bidirectional: bool = False):
    return CELLS[config.cell](
        input_size,
        hidden_size,
        layers,
        batch_first=True,
        dropout=config.dropout if layers > 1 else 0.0,
        bidirectional=bidirectional,
    )


def run(rnn: nn.RNNBase, inputs, state: tuple[torch.Tensor, ...] | None):
    """torch's own call, with the state always a tuple."""
    if isinstance(rnn, nn.LSTM):
        return rnn(inputs, state)
    outputs, hidden = rnn(inputs, None if state is None else state[0])
    return outputs, (hidden,)


class Source(NamedTuple):
    """What a step needs to know of the source."""

    values: torch.Tensor  # (B, S, D), or (B, L, S, D) for the states of every layer
    keys: torch.Tensor | None  # the same, projected
    visible: torch.Tensor  # (B, g, T, S), true where a step may look
    lengths: torch.Tensor  # (B,), in real tokens
    summary: torch.Tensor  # (B * g, D), the encoder's last state


class Step(NamedTuple):
    """What comes out of one step, or of T at once."""

    outputs: torch.Tensor  # (B * g, T, D)
    state: tuple[torch.Tensor, ...]
    layers: torch.Tensor  # (L, B * g, D), every layer's hidden state after the last step
    weights: tuple[torch.Tensor, ...]  # (B * g, T, S), of one attention or of one in each layer


def masked_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what is visible; where nothing is, they are all zero."""
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return weights.masked_fill(~visible, 0.0)


class DotScore(nn.Module):
    """q . k (Luong 2015, equation 8, "dot")"""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, Q, D), (B, S, D) -> (B, Q, S)"""
        return query @ keys.transpose(1, 2)


class ScaledDotScore(DotScore):
    """q . k / sqrt(D) (Vaswani 2017, equation 1)"""

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().forward(query, keys) * self.hidden_size**-0.5


class GeneralScore(DotScore):
    """q . W k (Luong 2015, equation 8, "general")"""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        return self.k_proj(states)


class AdditiveScore(DotScore):
    """v . tanh(W q + U k) (Bahdanau 2015, A.1.2)"""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.q_proj = Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, 1, bias=False)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        return self.k_proj(states)

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.v_proj((self.q_proj(query)[:, :, None] + keys[:, None]).tanh()).squeeze(-1)


SCORES = {"dot": DotScore, "scaled_dot": ScaledDotScore, "general": GeneralScore, "additive": AdditiveScore}


class SourceAttention(nn.Module):
    """
    The sum of the source's states, weighted by their scores. The g rows of a source are laid one after another, so that
    they share its states and keys.
    """

    def __init__(self, config: DragomanRnnConfig):
        super().__init__()
        self.score = SCORES[config.attention](config.hidden_size)

    def forward(self, query: torch.Tensor, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """(B * g, T, D) -> context (B * g, T, D), weights (B * g, T, S)"""
        sources, g, length, _ = source.visible.shape
        folded = query.reshape(sources, g * length, -1)
        weights = masked_softmax(self.score(folded, source.keys), source.visible.flatten(1, 2))
        context = weights @ source.values
        return context.view(query.shape), weights.view(sources * g, length, -1)


class Recurrence(nn.Module):
    """No attention: all that a step knows of the source is in its state (Sutskever 2014)."""

    one_call = True  # whether torch's fused call can take all steps of a known target at once
    first_state = 0  # 0: h (and c) are taken over from the encoder; 1: c alone

    def __init__(self, config: DragomanRnnConfig, context_size: int = 0):
        super().__init__()
        self.rnn = make_rnn(config, config.embedding_dim + context_size, config.hidden_size, config.decoder_layers)

    def keys(self, states: torch.Tensor) -> torch.Tensor | None:
        """The source as the scores want it, (B, S, D) -> (B, S, D); computed once per source."""
        return None

    def start(self, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The state before the first step, given what the encoder hands over."""
        return state

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        """Inputs (B * g, T, E), T = 1 where not `one_call`"""
        outputs, state = run(self.rnn, inputs, state)
        return Step(outputs, state, state[0], ())


class FixedContext(Recurrence):
    """The encoder's last state beside every input (Cho 2014, section 2.2)."""

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config, config.hidden_size)

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        context = source.summary[:, None].expand(-1, inputs.shape[1], -1)
        return super().forward(torch.cat((inputs, context), dim=-1), state, source)


class AttentionAfter(Recurrence):
    """tanh(W [context; h]) with the context of the new state h (Luong 2015, equation 5)."""

    def __init__(self, config: DragomanRnnConfig, context_size: int = 0):
        super().__init__(config, context_size)
        self.attention = SourceAttention(config)
        self.combine = Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        return self.attention.score.keys(states)

    def combined(self, context: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return self.combine(torch.cat((context, outputs), dim=-1)).tanh()

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        outputs, state = run(self.rnn, inputs, state)
        context, weights = self.attention(outputs, source)
        return Step(self.combined(context, outputs), state, state[0], (weights,))


class InputFeeding(AttentionAfter):
    """The same, and the result is fed to the next step beside its input (Luong 2015, section 3.3)."""

    one_call = False

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config, config.hidden_size)

    def start(self, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*state, torch.zeros_like(state[0][:1]))

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        *state_of_rnn, fed = state
        step = super().forward(torch.cat((inputs, fed.transpose(0, 1)), dim=-1), tuple(state_of_rnn), source)
        return step._replace(state=(*step.state, step.outputs.transpose(0, 1)))


class AttentionBefore(AttentionAfter):
    """The context of the previous state beside every input (Bahdanau 2015, section 3.1 and A.2.2)."""

    one_call = False

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config, config.hidden_size)

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        context, weights = self.attention(state[0][-1][:, None], source)
        outputs, state = run(self.rnn, torch.cat((inputs, context), dim=-1), state)
        return Step(self.combined(context, outputs), state, state[0], (weights,))


def by_source_length(source: Source) -> torch.Tensor:
    """(B, 1, 1, 1)"""
    return source.lengths.clamp(min=1).to(source.values.dtype).sqrt()[:, None, None, None]


def by_hidden_size(source: Source) -> float:
    return source.values.shape[-1] ** 0.5


class ContextAsState(Recurrence):
    """
    In every layer the context of the current input among the same layer's encoder states takes the place of h before
    the step; c is kept. Without a c (GRU, plain RNN) nothing is left of earlier steps but the input.
    """

    one_call = False
    first_state = 1

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config)
        same = config.embedding_dim == config.hidden_size
        self.q_proj = nn.Identity() if same else Linear(config.embedding_dim, config.hidden_size)
        self.divisor = {"source_length": by_source_length, "hidden_size": by_hidden_size}[config.context_scaling]

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], source: Source) -> Step:
        sources, g, _, length = source.visible.shape
        query = self.q_proj(inputs).view(sources, 1, g, -1)
        scores = query @ source.values.transpose(2, 3) / self.divisor(source)  # (B, L, g, S)
        weights = masked_softmax(scores, source.visible.transpose(1, 2))
        contexts = (weights @ source.values).transpose(0, 1).flatten(1, 2).contiguous()  # (L, B * g, D)
        outputs, state = run(self.rnn, inputs, (contexts, *state))
        per_layer = weights.transpose(0, 1).reshape(-1, sources * g, 1, length)
        return Step(outputs, state[1:], state[0], tuple(per_layer))


def make_recurrence(config: DragomanRnnConfig) -> Recurrence:
    if config.attention == "context_as_state":
        return ContextAsState(config)
    if config.attention == "none":
        return FixedContext(config) if config.context_every_step else Recurrence(config)
    if config.context_every_step:
        return AttentionBefore(config)
    return InputFeeding(config) if config.input_feeding else AttentionAfter(config)
