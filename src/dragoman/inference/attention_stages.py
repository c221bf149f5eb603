"""Attention taken apart: from the scores of one layer to its weighted sum, with the numbers of a real model.

Shapes: H heads, T queries, S keys, d width of a head (or of the state, in the recurrent family).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dragoman.inference.attention_maps import check_choices, eager


@dataclass
class Stages:
    """What one layer computes, stage by stage.

    Attributes:
        formula: how the scores come about.
        scores: (H, T, S), before any scaling.
        divisor: what the scores are divided by; 1.0 where they are not scaled.
        scaled: (H, T, S), `scores / divisor`.
        bias: (H, T, S), what relative positions add, or None.
        masked: (H, T, S), with what may not be seen at minus infinity.
        weights: (H, T, S), the softmax of that.
        values: (H, S, d), what is summed.
        output: (H, T, d), `weights @ values`, before the heads are put together.
    """

    formula: str
    scores: torch.Tensor
    divisor: float
    scaled: torch.Tensor
    bias: torch.Tensor | None
    masked: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def attention_stages(
    model: PreTrainedModel, input_ids: list[int], fed_ids: list[int], kind: str = "cross", layer: int = 0
) -> Stages:
    """
    The stages of one layer for one sentence pair, from the queries, keys, values and masks that the model itself has.

    Args:
        input_ids: S source ids; fed_ids: T target ids that are fed to the decoder (`encode_pair` gives both).
        kind: "cross", "encoder" or "decoder".

    Raises:
        ValueError: a kind or layer that the model does not have, or a model of another package.
    """
    if model.config.model_type not in ("dragoman", "dragoman_rnn"):
        raise ValueError(
            f"the stages of attention are read from models of Dragoman, and this is a {model.config.model_type!r}: "
            "`dragoman convert` makes one of it."
        )
    check_choices(model, kind, layer)
    mechanism = model.config.to_dict().get("attention", "transformer")
    module = _module(model, mechanism, kind, layer)
    with eager(model), _recorded(module) as calls:
        model(
            input_ids=torch.tensor([input_ids], device=model.device),
            decoder_input_ids=torch.tensor([fed_ids], device=model.device),
            use_cache=False,
        )
    steps = []  # a recurrent decoder may take the target step by step
    for arguments, keywords in calls:
        if mechanism == "transformer":
            steps.append(_of_transformer(module, kind, arguments, keywords))
        elif mechanism == "context_as_state":
            steps.append(_of_context_as_state(module, arguments[0], arguments[2], layer))
        else:
            steps.append(_of_source_attention(module, arguments[0], arguments[1], mechanism))
    joined: dict[str, Any] = {
        name: torch.cat([getattr(step, name) for step in steps], dim=1).float().cpu()
        for name in ("scores", "scaled", "masked", "weights", "output")
    }
    first = steps[0]
    return Stages(
        formula=first.formula,
        divisor=first.divisor,
        bias=None if first.bias is None else first.bias.float().cpu(),
        values=first.values.float().cpu(),
        **joined,
    )


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """The arguments of every call of the module inside, by this thread: others may be using the model too."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    thread = threading.get_ident()

    def record(_, arguments, keywords):
        if threading.get_ident() == thread:
            calls.append((arguments, keywords))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _module(model: Any, mechanism: str, kind: str, layer: int) -> Any:
    stack = model.get_encoder() if kind == "encoder" else model.get_decoder()
    if mechanism == "transformer":
        return stack.layers[layer].cross_attn if kind == "cross" else stack.layers[layer].self_attn
    return stack.recurrence if mechanism == "context_as_state" else stack.recurrence.attention


def _of_transformer(module: Any, kind: str, arguments: tuple, keywords: dict[str, Any]) -> Stages:
    """As `DragomanSelfAttention.forward` and `DragomanCrossAttention.forward`, for one sentence."""
    states, mask, *more = arguments
    read = more[0] if kind == "cross" else states
    query = module.q_norm(module.split_heads(module.q_proj(states)))
    key = module.k_norm(module.split_heads(module.k_proj(read)))
    value = module.split_heads(module.v_proj(read))
    if kind != "cross":
        query, key = module.turn(query, key, more[0])
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3)
    scaled = scores * module.scaling
    bias = keywords.get("position_bias")
    masked = scaled if bias is None else scaled + bias
    if mask is not None:
        masked = masked.masked_fill(mask < 0, -torch.inf)
    weights = masked.softmax(dim=-1)
    return Stages(
        formula="q · k",
        scores=scores[0],
        divisor=1 / module.scaling,
        scaled=scaled[0],
        bias=None if bias is None else bias.expand_as(scores)[0],
        masked=masked[0],
        weights=weights[0],
        values=value[0],
        output=(weights @ value)[0],
    )


def _of_source_attention(module: Any, query: torch.Tensor, source: Any, name: str) -> Stages:
    """As `SourceAttention.forward`: one attention, one head, whose values are the states of the source."""
    scaled = module.score(query, source.keys)
    divisor = module.score.hidden_size**0.5 if name == "scaled_dot" else 1.0
    formula = {"general": "q · W k", "additive": "v · tanh(W q + U k)"}.get(name, "q · k")
    return _of_recurrent(formula, scaled * divisor, divisor, scaled, source.visible[:, 0], source.values)


def _of_context_as_state(module: Any, inputs: torch.Tensor, source: Any, layer: int) -> Stages:
    """As `ContextAsState.forward`: the decoder's input against the same layer's states of the encoder."""
    values = source.values[:, layer]
    scores = module.q_proj(inputs) @ values.transpose(1, 2)
    divisor = float(torch.as_tensor(module.divisor(source)))
    return _of_recurrent("q · h", scores, divisor, scores / divisor, source.visible[:, 0], values)


def _of_recurrent(
    formula: str,
    scores: torch.Tensor,
    divisor: float,
    scaled: torch.Tensor,
    visible: torch.Tensor,
    values: torch.Tensor,
) -> Stages:
    masked = scaled.masked_fill(~visible, -torch.inf)
    weights = masked.softmax(dim=-1)
    return Stages(formula, scores, divisor, scaled, None, masked, weights, values, weights @ values)
