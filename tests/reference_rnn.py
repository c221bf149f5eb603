"""
Slow and obvious versions of the recurrent family: loops over steps and positions written from the equations, and the
plain classes that the historical systems are usually written as.
"""

import math

import torch
from torch import nn


# ---------------------------------------------------------------- plain loops, from named weights and a config


def cell_step(kind, x, state, w_ih, w_hh, b_ih, b_hh):
    """One step of one layer for one sentence. `state` is [h, c] for an LSTM, else [h]; x and h are vectors."""
    h = state[0]
    a, b = w_ih @ x + b_ih, w_hh @ h + b_hh
    if kind == "rnn":
        return [torch.tanh(a + b)]
    if kind == "gru":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return [(1 - z) * n + z * h]
    i, f, g, o = (a + b).chunk(4)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def layer_weights(weights, prefix, layer, direction=""):
    return [
        weights[f"{prefix}.{name}_l{layer}{direction}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]


def encode(weights, config, source):
    """Per layer: the states at every source position, S vectors; and the last state, [h, c] or [h]."""
    names = ("h", "c") if config.cell == "lstm" else ("h",)
    prefix = "model.encoder.rnn"
    inputs = [weights["model.encoder.embed_tokens.weight"][token] for token in source]
    forwards, backwards = list(range(len(source))), list(reversed(range(len(source))))
    layers, finals = [], []
    for layer in range(config.encoder_layers):
        if config.bidirectional_encoder:
            passes = [("", forwards), ("_reverse", backwards)]
        else:
            passes = [("", backwards if config.reverse_source else forwards)]
        width = config.hidden_size // len(passes)
        states, last = [[] for _ in source], [[] for _ in names]
        for direction, order in passes:
            state = [inputs[0].new_zeros(width) for _ in names]
            for position in order:
                state = cell_step(
                    config.cell, inputs[position], state, *layer_weights(weights, prefix, layer, direction)
                )
                states[position].append(state[0])
            for collected, value in zip(last, state, strict=True):
                collected.append(value)
        inputs = [torch.cat(both) for both in states]
        layers.append(inputs)
        finals.append([torch.cat(both) for both in last])
    return layers, finals


def first_state(weights, config, finals):
    """The decoder's state before the first step, per layer."""
    if not config.bidirectional_encoder and config.encoder_layers == config.decoder_layers:
        return [list(final) for final in finals]
    state = []
    for layer in range(config.decoder_layers):
        final = finals[layer] if config.encoder_layers == config.decoder_layers else finals[-1]
        row = []
        for name, value in zip(("h", "c"), final, strict=False):
            place = f"model.decoder.bridge.projections.{name}.{layer}"
            if f"{place}.weight" not in weights:  # context_as_state needs no first h
                row.append(torch.zeros_like(value))
                continue
            projected = weights[f"{place}.weight"] @ value + weights[f"{place}.bias"]
            row.append(torch.tanh(projected) if name == "h" else projected)
        state.append(row)
    return state


def score(weights, config, query, key):
    """The score of one source state for one query."""
    place = "model.decoder.recurrence.attention.score"
    if config.attention == "dot":
        return query @ key
    if config.attention == "scaled_dot":
        return query @ key / math.sqrt(len(key))
    if config.attention == "general":
        return query @ (weights[f"{place}.k_proj.weight"] @ key)
    hidden = torch.tanh(weights[f"{place}.q_proj.weight"] @ query + weights[f"{place}.k_proj.weight"] @ key)
    return weights[f"{place}.v_proj.weight"][0] @ hidden


def weighted_sum(scores, values, step, config):
    """Softmax over the visible positions. Returns the context, and a weight for every position."""
    exponentials = []
    for position, value in enumerate(scores):
        seen = config.attention_direction == "bidirectional" or position <= step
        exponentials.append(torch.exp(value) if seen else torch.zeros_like(value))
    total = sum(exponentials)
    weights = [value / total for value in exponentials]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)), weights


def rnn_logits(weights, config, source, target, gold=None):
    """
    One unpadded pair.

    Args:
        weights: tensors by name. target: begins with the start token. gold: for each step whether the token of the
            target is fed, or the most probable one of the step before; None feeds the target.

    Returns:
        logits (T, V) and, per attention, the weights (T, S).
    """
    layers, finals = encode(weights, config, source)
    top = layers[-1]
    state = first_state(weights, config, finals)
    prefix = "model.decoder.recurrence"
    fed = torch.zeros_like(top[0])
    logits, attentions = [], []
    for step, token in enumerate(target):
        if gold is not None and not gold[step]:
            token = int(logits[-1].argmax())
        x = embedded = weights["model.decoder.embed_tokens.weight"][token]
        seen = []
        if config.attention == "none" and config.context_every_step:
            x = torch.cat((x, finals[-1][0]))
        elif config.attention == "context_as_state":
            query = embedded
            if f"{prefix}.q_proj.weight" in weights:
                query = weights[f"{prefix}.q_proj.weight"] @ embedded + weights[f"{prefix}.q_proj.bias"]
            divisor = len(source) if config.context_scaling == "source_length" else config.hidden_size
            for layer, states in enumerate(layers):
                scores = [query @ key / math.sqrt(divisor) for key in states]
                state[layer][0], row = weighted_sum(scores, states, step, config)
                seen.append(row)
        elif config.context_every_step:
            scores = [score(weights, config, state[-1][0], key) for key in top]
            context, row = weighted_sum(scores, top, step, config)
            seen.append(row)
            x = torch.cat((x, context))
        elif config.input_feeding:
            x = torch.cat((x, fed))
        for layer in range(config.decoder_layers):
            state[layer] = cell_step(config.cell, x, state[layer], *layer_weights(weights, f"{prefix}.rnn", layer))
            x = state[layer][0]
        output = x
        if config.attention not in ("none", "context_as_state"):
            if not config.context_every_step:
                scores = [score(weights, config, output, key) for key in top]
                context, row = weighted_sum(scores, top, step, config)
                seen.append(row)
            output = torch.tanh(weights[f"{prefix}.combine.weight"] @ torch.cat((context, output)))
            fed = output
        value = weights["lm_head.weight"] @ output
        logits.append(value + weights["lm_head.bias"] if config.lm_head_bias else value)
        attentions.append(seen)
    per_attention = [torch.stack([torch.stack(row) for row in rows]) for rows in zip(*attentions, strict=True)]
    return torch.stack(logits), per_attention


# ---------------------------------------------------------------- the systems as plain classes


class GruTwin(nn.Module):
    """Cho 2014 without attention: embedding -> GRU -> linear, the encoder's last state being the decoder's first."""

    def __init__(self, source_vocab, target_vocab, embedding, hidden):
        super().__init__()
        self.source_embedding = nn.Embedding(source_vocab, embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.target_embedding = nn.Embedding(target_vocab, embedding)
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, target_vocab)

    def forward(self, source, target):
        _, state = self.encoder(self.source_embedding(source))
        outputs, _ = self.decoder(self.target_embedding(target), state)
        return self.linear(outputs)


class EDM(nn.Module):
    """Sutskever 2014: stacked LSTMs, (h, c) handed over, and at each step either the true token or its own."""

    def __init__(self, source_vocab, target_vocab, embedding, hidden, layers, dropout):
        super().__init__()
        self.source_embedding = nn.Embedding(source_vocab, embedding)
        self.encoder = nn.LSTM(embedding, hidden, layers, dropout=dropout, batch_first=True)
        self.target_embedding = nn.Embedding(target_vocab, embedding)
        self.decoder = nn.LSTM(embedding, hidden, layers, dropout=dropout, batch_first=True)
        self.linear = nn.Linear(hidden, target_vocab)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source, target, teacher_forcing_ratio):
        _, state = self.encoder(self.dropout(self.source_embedding(source)))
        token, logits = target[:, :1], []
        for step in range(target.shape[1]):
            outputs, state = self.decoder(self.dropout(self.target_embedding(token)), state)
            logits.append(self.linear(outputs))
            if step + 1 < target.shape[1]:
                coins = torch.rand(target.shape[0], 1) < teacher_forcing_ratio
                token = torch.where(coins, target[:, step + 1 : step + 2], logits[-1].argmax(dim=-1))
        return torch.cat(logits, dim=1)


class AttentionEDM(nn.Module):
    """The same, and before each step attention over a layer's encoder states replaces that layer's h; c is kept."""

    def __init__(self, source_vocab, target_vocab, embedding, hidden, layers, dropout):
        super().__init__()
        widths = [embedding] + [hidden] * (layers - 1)
        self.source_embedding = nn.Embedding(source_vocab, embedding)
        self.encoder = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.target_embedding = nn.Embedding(target_vocab, embedding)
        self.decoder = nn.ModuleList(nn.LSTMCell(width, hidden) for width in widths)
        self.query = nn.Linear(embedding, hidden) if embedding != hidden else nn.Identity()
        self.linear = nn.Linear(hidden, target_vocab)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source, target, padding=None, unidirectional=False):
        """`padding` (B, S), true at source positions that are none."""
        x = self.dropout(self.source_embedding(source))
        layer_states, cells = [], []
        for layer in self.encoder:
            x, (_, c) = layer(x)
            layer_states.append(x)
            cells.append(c[0])
            x = self.dropout(x)
        logits = []
        for step in range(target.shape[1]):
            x = self.dropout(self.target_embedding(target[:, step]))
            query = self.query(x)
            for index, (layer, states) in enumerate(zip(self.decoder, layer_states, strict=True)):
                scores = torch.einsum("bd,bsd->bs", query, states) / math.sqrt(source.shape[1])
                if padding is not None:
                    scores = scores.masked_fill(padding, -math.inf)
                if unidirectional:
                    scores[:, step + 1 :] = -math.inf
                context = torch.einsum("bs,bsd->bd", scores.softmax(dim=-1), states)
                h, cells[index] = layer(x, (context, cells[index]))
                x = self.dropout(h)
            logits.append(self.linear(h))
        return torch.stack(logits, dim=1)
