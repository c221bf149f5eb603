"""
Slow and obvious versions of what the package does fast, written from the formulas: one sentence at a time, loops over
heads and positions, no masks, no caches.
"""

import itertools
import math

import torch
from torch import nn


# ---------------------------------------------------------------- the Transformer, from a state dict and a config


def transformer_logits(model, source: list[int], target: list[int]) -> torch.Tensor:
    """Logits (T, V) of one unpadded pair; `target` begins with the start token."""
    return _head(model, transformer_states(model, source, target))


def transformer_states(model, source: list[int], target: list[int]) -> torch.Tensor:
    """Decoder states (T, D) after the final norm."""
    weights, config = _weights(model), model.config
    memory = _stack(weights, config, "encoder", source, None)
    return _stack(weights, config, "decoder", target, memory)


def _weights(model):
    return dict(model.named_parameters(remove_duplicate=False))  # tied tables appear under each of their names


def _head(model, states):
    weights, scale = _weights(model), model.config.logit_scale or 1.0
    logits = (states * scale) @ weights["lm_head.weight"].T
    return logits + weights["lm_head.bias"] if "lm_head.bias" in weights else logits


def _stack(weights, config, side, ids, memory):
    prefix = f"model.{side}."
    x = weights[prefix + "embed_tokens.weight"][ids]
    width = x.shape[-1]
    if config.scale_embedding:
        x = x * math.sqrt(width)
    if config.position_embedding_type == "sinusoidal":
        table = sinusoids(len(ids) + config.sinusoid_offset, width, config.sinusoid_layout, config.sinusoid_endpoint)
        x = x + table[config.sinusoid_offset :].to(x)
    if config.position_embedding_type == "learned":
        x = x + weights[prefix + "embed_positions.weight"][: len(ids)]
    if config.embedding_norm:
        x = _norm(weights, config, prefix + "embedding_norm", x)
    for index in range(getattr(config, f"{side}_layers")):
        layer = f"{prefix}layers.{index}."
        sublayers = [("self_attn", lambda y, name: _attention(weights, config, side, name, y, y, side == "decoder"))]
        if memory is not None:
            sublayers.append(("cross_attn", lambda y, name: _attention(weights, config, side, name, y, memory, None)))
        sublayers.append(("mlp", lambda y, name: _mlp(weights, config, name, y)))
        for name, sublayer in sublayers:
            if config.norm_position == "pre":
                x = x + sublayer(_norm(weights, config, f"{layer}{name}_norm", x), layer + name)
            else:
                x = _norm(weights, config, f"{layer}{name}_norm", x + sublayer(x, layer + name))
    return _norm(weights, config, prefix + "norm", x) if config.final_norm else x


def sinusoids(length: int, width: int, layout: str, endpoint: bool = False) -> torch.Tensor:
    table = torch.zeros(length, width, dtype=torch.float64)
    for position in range(length):
        for pair in range(width // 2):
            angle = position / 10000 ** (pair / (width // 2 - 1) if endpoint else 2 * pair / width)
            sine, cosine = (2 * pair, 2 * pair + 1) if layout == "interleaved" else (pair, width // 2 + pair)
            table[position, sine], table[position, cosine] = math.sin(angle), math.cos(angle)
    return table


def _linear(weights, name, x):
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def _norm(weights, config, name, x):
    if config.norm_type == "layernorm":
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]
    return _rms(x, weights[name + ".weight"], config.norm_eps)


def _rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _activation(config, x):
    if config.activation_function == "relu":
        return x.clamp(min=0)
    if config.activation_function == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert config.activation_function == "silu"
    return x / (1 + torch.exp(-x))


def _mlp(weights, config, name, x):
    up = _linear(weights, name + ".up_proj", x)
    if config.gated_mlp:
        inner = _activation(config, _linear(weights, name + ".gate_proj", x)) * up
    else:
        inner = _activation(config, up)
    return _linear(weights, name + ".down_proj", inner)


def _rotate(vector, position, theta):
    half = len(vector) // 2
    turned = [vector[0]] * len(vector)
    for i in range(half):
        # The library keeps frequencies in single precision, as Transformers does everywhere.
        frequency = (theta ** -(torch.tensor(2 * i, dtype=torch.float32) / len(vector))).double()
        cosine, sine = torch.cos(position * frequency), torch.sin(position * frequency)
        turned[i] = vector[i] * cosine - vector[i + half] * sine
        turned[i + half] = vector[i + half] * cosine + vector[i] * sine
    return torch.stack(turned)


def relative_bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Raffel 2020: `distance` is key position minus query position."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        if distance > 0:
            bucket += num_buckets
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    wide = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact))
    return bucket + min(wide, num_buckets - 1)


def _attention(weights, config, side, name, x, memory, causal):
    """`causal` is None for cross-attention."""
    heads, groups = getattr(config, f"{side}_attention_heads"), getattr(config, f"{side}_num_key_value_heads")
    size = getattr(config, f"{side}_head_dim")
    queries = _linear(weights, name + ".q_proj", x).view(len(x), heads, size)
    keys = _linear(weights, name + ".k_proj", memory).view(len(memory), groups, size)
    values = _linear(weights, name + ".v_proj", memory).view(len(memory), groups, size)
    scale = size**-0.5 if config.attention_scaling is None else config.attention_scaling

    def place(vector, position, norm):
        if config.qk_norm:
            vector = _rms(vector, weights[f"{name}.{norm}.weight"], config.norm_eps)
        if config.position_embedding_type == "rotary" and causal is not None:
            vector = _rotate(vector, position, config.rope_parameters["rope_theta"])
        return vector

    output = []
    for head in range(heads):
        group = head // (heads // groups)
        placed_keys = [place(keys[s, group], s, "k_norm") for s in range(len(memory))]
        for t in range(len(x)):
            query, scores = place(queries[t, head], t, "q_norm"), []
            for s in range(len(memory)):
                unseen = (causal and s > t) or (
                    causal is None and config.attention_direction == "unidirectional" and s > t
                )
                score = query @ placed_keys[s] * scale
                if config.position_embedding_type == "relative" and causal is not None:
                    bucket = relative_bucket(
                        s - t, side == "encoder", config.relative_num_buckets, config.relative_max_distance
                    )
                    score = score + weights[f"model.{side}.relative_bias.weight.weight"][bucket, head]
                scores.append(torch.full_like(score, -math.inf) if unseen else score)
            probabilities = torch.stack(scores).softmax(dim=0)
            output.append(sum(probabilities[s] * values[s, group] for s in range(len(memory))))
    output = torch.stack(output).view(heads, len(x), size).transpose(0, 1)
    return _linear(weights, name + ".o_proj", output.reshape(len(x), heads * size))


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """
    `torch.nn.attention.varlen.varlen_attn`, from its documentation, for what it is asked here: the queries (Q, H, d) of
    each sequence over its keys (R, G, d); with a window of (-1, 0) the last query sees the last key, as in flash
    attention since 2.1.
    """
    assert return_aux is seqused_k is block_table is num_splits is None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size in ((-1, -1), (-1, 0))
    assert query.dtype == key.dtype == value.dtype
    heads, groups = query.shape[1], key.shape[1]
    assert enable_gqa or heads == groups
    query_ends, key_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert len(query_ends) == len(key_ends) > 1
    assert (query_ends[0], query_ends[-1], key_ends[0], key_ends[-1]) == (0, len(query), 0, len(key))
    assert max(b - a for a, b in itertools.pairwise(query_ends)) == max_q
    assert max(b - a for a, b in itertools.pairwise(key_ends)) == max_k
    rows = []
    for sequence in range(len(query_ends) - 1):
        first, after = query_ends[sequence : sequence + 2]
        keys, values = (x[slice(*key_ends[sequence : sequence + 2])].double() for x in (key, value))
        assert len(keys)
        for place in range(first, after):
            seen = len(keys) - (after - 1 - place) if window_size == (-1, 0) else len(keys)
            parts = []
            for head in range(heads):
                group = head // (heads // groups)
                scores = keys[:seen, group] @ query[place, head].double() * scale
                parts.append(scores.softmax(dim=0) @ values[:seen, group])
            rows.append(torch.stack(parts))
    return torch.stack(rows).to(query.dtype)


# ---------------------------------------------------------------- whole classes, as the founding texts describe them


class PlainAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_k)) V per head, heads concatenated and projected (Vaswani 2017, section 3.2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory, mask):
        size = x.shape[-1] // self.heads
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        outputs = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            outputs.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[..., part])
        return self.out(torch.cat(outputs, dim=-1))


class PlainLayer(nn.Module):
    def __init__(self, width, heads, inner, activation, pre_norm, cross):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attention = PlainAttention(width, heads)
        self.cross_attention = PlainAttention(width, heads) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), activation, nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3 if cross else 2))

    def forward(self, x, mask, memory=None, memory_mask=None):
        sublayers = [lambda y: self.self_attention(y, y, mask)]
        if self.cross_attention is not None:
            sublayers.append(lambda y: self.cross_attention(y, memory, memory_mask))
        sublayers.append(self.feed_forward)
        for norm, sublayer in zip(self.norms, sublayers, strict=True):
            x = x + sublayer(norm(x)) if self.pre_norm else norm(x + sublayer(x))
        return x


class PlainTransformer(nn.Module):
    """
    The two Transformers of the founding texts as one ordinary module.

    post-norm: shared, scaled embeddings that are also the output layer; no final norms; ReLU.
    pre-norm: embeddings of their own for both sides, not scaled; final norms; untied output layer with bias; GELU.
    """

    def __init__(self, source_vocab, target_vocab, width, heads, layers, inner, pre_norm):
        super().__init__()
        self.pre_norm, self.width = pre_norm, width
        (encoder_layers, decoder_layers), (inner, inner_decoder) = layers, inner
        activation = nn.GELU() if pre_norm else nn.ReLU()
        self.source_embedding = nn.Embedding(source_vocab, width)
        self.target_embedding = nn.Embedding(target_vocab, width) if pre_norm else self.source_embedding
        self.encoder = nn.ModuleList(
            PlainLayer(width, heads, inner, activation, pre_norm, cross=False) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            PlainLayer(width, heads, inner_decoder, activation, pre_norm, cross=True) for _ in range(decoder_layers)
        )
        if pre_norm:
            self.encoder_norm, self.decoder_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.output = nn.Linear(width, target_vocab)

    def forward(self, source, target, source_mask):
        scale = 1.0 if self.pre_norm else math.sqrt(self.width)
        padding = source_mask.bool()[:, None, :]  # (B, 1, S)
        look_ahead = torch.ones(target.shape[1], target.shape[1]).tril().bool()[None]  # (1, T, T)
        table = sinusoids(5000, self.width, "interleaved")
        x = self.source_embedding(source) * scale + table[: source.shape[1]]
        for layer in self.encoder:
            x = layer(x, padding)
        memory = self.encoder_norm(x) if self.pre_norm else x
        y = self.target_embedding(target) * scale + table[: target.shape[1]]
        for layer in self.decoder:
            y = layer(y, look_ahead, memory, padding)
        if self.pre_norm:
            return self.output(self.decoder_norm(y))
        return y @ self.target_embedding.weight.T


# ---------------------------------------------------------------- decoding


@torch.no_grad()
def contrastive_search(model, input_ids, attention_mask, penalty_alpha, top_k, max_new_tokens, start, eos, pad):
    """
    Su 2022, equation 5, by brute force: one sentence at a time, every candidate appended to the whole prefix and the
    whole prefix run through the model again.
    """

    def run(source, target):
        outputs = model(input_ids=source, decoder_input_ids=target, use_cache=False, output_hidden_states=True)
        return outputs.logits[0, -1], outputs.decoder_hidden_states[-1][0]

    sequences = []
    for row in range(len(input_ids)):
        source = input_ids[row : row + 1, attention_mask[row].bool()]
        target = torch.tensor([[start]])
        for _ in range(max_new_tokens):
            logits, states = run(source, target)
            probabilities, candidates = logits.softmax(-1).topk(top_k)
            scores = []
            for probability, candidate in zip(probabilities, candidates, strict=True):
                _, longer = run(source, torch.cat((target, candidate.view(1, 1)), dim=1))
                cosines = [nn.functional.cosine_similarity(longer[-1], earlier, dim=0) for earlier in states]
                scores.append((1 - penalty_alpha) * probability - penalty_alpha * max(cosines))
            chosen = candidates[torch.stack(scores).argmax()]
            target = torch.cat((target, chosen.view(1, 1)), dim=1)
            if chosen == eos:
                break
        sequences.append(target[0])
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)


def next_log_probabilities(model, source, target):
    """Of what follows the tokens of a target, a list, after one source, (1, S)."""
    logits = model(input_ids=source, decoder_input_ids=torch.tensor([target]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1).tolist()


def diverse_beam_search(model, source, groups, w, penalty, max_new_tokens, length_penalty, start, eos):
    """
    Vijayakumar 2016, algorithm 1, for one source (1, S), with lists: -> (score, tokens after the start), best first.
    `early_stopping=False`: a group gives up when the best of its beams, as it is, is behind all that have ended.
    """
    beams = [[(0.0, [])] for _ in range(groups)]
    ended = [[] for _ in range(groups)]
    for step in range(1, max_new_tokens + 1):
        used = []
        for group in range(groups):
            candidates = []
            for total, tokens in beams[group]:
                log_probabilities = next_log_probabilities(model, source, [start, *tokens])
                for token, value in enumerate(log_probabilities):
                    candidates.append((total + value - penalty * used.count(token), [*tokens, token]))
            candidates.sort(key=lambda candidate: -candidate[0])
            last = step == max_new_tokens
            for total, tokens in candidates[:w]:
                if tokens[-1] == eos or last:
                    ended[group].append((total / step**length_penalty, tokens))
            ended[group] = sorted(ended[group], key=lambda one: -one[0])[:w]
            going_on = [(total, tokens) for total, tokens in candidates if tokens[-1] != eos][:w]
            used += [tokens[-1] for _, tokens in going_on]
            hope = max((total for total, _ in going_on), default=0.0) / step**length_penalty
            gives_up = len(ended[group]) == w and hope <= ended[group][-1][0]
            beams[group] = [] if gives_up or last else going_on
    return sorted((one for group in ended for one in group), key=lambda one: -one[0])


def every_output(model, source, max_new_tokens, start, eos):
    """All that can be written after one source, (1, S): dictionary from tokens after the start to log-probabilities."""
    outputs, open_ones = {}, {(): []}
    for _ in range(max_new_tokens):
        targets = torch.tensor([[start, *tokens] for tokens in open_ones])
        logits = model(input_ids=source.expand(len(targets), -1), decoder_input_ids=targets, use_cache=False).logits
        longer = {}
        for (tokens, values), row in zip(open_ones.items(), logits[:, -1].log_softmax(-1).tolist(), strict=True):
            for token, value in enumerate(row):
                part = outputs if token == eos else longer
                part[*tokens, token] = [*values, value]
        open_ones = longer
    return outputs | open_ones


# ---------------------------------------------------------------- loss


def next_token_loss(logits, labels, label_smoothing=0.0):
    """Mean over the labels that are not -100 of -(1 - e) log p(label) - e / V * sum_v log p(v)."""
    total, count = torch.zeros((), dtype=logits.dtype), 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[row, t] != -100:
                log_p = logits[row, t] - logits[row, t].exp().sum().log()
                total = total - (1 - label_smoothing) * log_p[labels[row, t]] - label_smoothing * log_p.mean()
                count += 1
    return total / count
