"""
A model of the recurrent family as two ONNX graphs, which `onnx_generate.py` decodes with. Of what depends on the
attention there is what the model has; `place` only where target step t sees no source position after t:

    encoder.onnx       input_ids (B, S), attention_mask (B, S)
                       -> source_values (B, S, D), or (B, L, S, D) for every layer; source_keys (B, S, D); summary
                       (B, D); state_h, state_c (L, B, D), state_fed (1, B, D), the state before the first step
    decoder_step.onnx  decoder_input_ids (B, g), attention_mask, place (), source_values, source_keys, summary, state_h,
                       state_c, state_fed (L, B, g, D)
                       -> logits (B, g, V), next_state_h, next_state_c, next_state_fed
"""

import copy
from typing import Any

import torch
from torch import nn

from dragoman.models.configuration_dragoman_rnn import DragomanRnnConfig
from dragoman.models.modeling_dragoman_rnn import DragomanRnnForConditionalGeneration, reading_order, take
from dragoman.models.recurrent_attention import Source


# Shapes: B sources, g target rows per source (beams), N rows, S source length, T steps, L layers, E width of an input,
# D hidden size, V target vocabulary.

# ONNX's name of the cell, and the places of its gates among torch's.
CELLS = {"lstm": ("LSTM", (0, 3, 1, 2)), "gru": ("GRU", (1, 0, 2)), "rnn": ("RNN", (0,))}


class OnnxCell:
    """`forward` of a torch RNN as ONNX's own operator, for rows of different lengths and any number of steps."""

    cell: str
    num_layers: int
    hidden_size: int
    bidirectional: bool
    get_buffer: Any

    def forward(self, inputs: torch.Tensor, state: Any, lengths: torch.Tensor | None = None):
        """Inputs (N, T, E), torch's state or None, real lengths (N,) -> as torch's call, with outputs of all layers."""
        name, _ = CELLS[self.cell]
        before = state if isinstance(state, tuple) else (state,)
        directions = 2 if self.bidirectional else 1
        rows, steps, _ = inputs.shape
        final = (directions, rows, self.hidden_size)
        x, layers, finals = inputs, [], []
        for layer in range(self.num_layers):
            weights = [self.get_buffer(f"{what}_{layer}") for what in ("input", "recurrent", "biases")]
            starts = [None if one is None else one[layer * directions : (layer + 1) * directions] for one in before]
            outputs, *after = torch.onnx.ops.symbolic_multi_out(
                name,
                (x.transpose(0, 1), *weights, lengths, *starts),
                {
                    "hidden_size": self.hidden_size,
                    "direction": "bidirectional" if self.bidirectional else "forward",
                    **({"linear_before_reset": 1} if self.cell == "gru" else {}),
                },
                dtypes=[x.dtype] * (3 if self.cell == "lstm" else 2),
                shapes=[(steps, directions, rows, self.hidden_size), *[final] * (2 if self.cell == "lstm" else 1)],
            )
            x = outputs.permute(2, 0, 1, 3).flatten(2)  # (N, T, directions * D)
            layers.append(x)
            finals.append(after)
        ended = tuple(torch.cat(states) for states in zip(*finals, strict=True))
        return x if lengths is None else layers, ended if self.cell == "lstm" else ended[0]


def with_onnx_cells(model: nn.Module, cell: str) -> Any:
    """A copy whose RNNs are ONNX operators, with the weights of a layer's directions in one tensor."""
    model = copy.deepcopy(model)
    for rnn in [module for module in model.modules() if isinstance(module, nn.RNNBase)]:
        _, order = CELLS[cell]
        gates = torch.tensor(order)[:, None] * rnn.hidden_size + torch.arange(rnn.hidden_size)
        directions = 2 if rnn.bidirectional else 1
        for layer in range(rnn.num_layers):
            weights: Any = rnn.all_weights[layer * directions : (layer + 1) * directions]
            for what, numbers in (("input", (0,)), ("recurrent", (1,)), ("biases", (2, 3))):
                parts = [torch.cat([group[number][gates.flatten()] for number in numbers]) for group in weights]
                rnn.register_buffer(f"{what}_{layer}", torch.stack(parts).detach())
        rnn.__class__ = type("OnnxRnn", (OnnxCell, type(rnn)), {"cell": cell})
    return model


STATES = ("state_h", "state_c", "state_fed")


def names_of(config: DragomanRnnConfig) -> list[str]:
    """What the decoder of such a model reads of the source at every step, and what it hands on from step to step."""
    names = {
        "source_values": config.attention != "none",
        "source_keys": config.attention in ("general", "additive"),
        "summary": config.attention == "none" and config.context_every_step,
        "state_h": config.attention != "context_as_state",
        "state_c": config.cell == "lstm",
        "state_fed": config.input_feeding,
    }
    return [name for name, there in names.items() if there]


class Encoder(nn.Module):
    """Source ids and mask -> what `names_of` names"""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder, decoder, config = self.model.model.encoder, self.model.model.decoder, self.model.config
        order = reading_order(attention_mask.bool(), config.reverse_source)
        back = order.argsort(dim=1)
        lengths = attention_mask.sum(dim=1).clamp(min=1).to(torch.int32)
        outputs, ended = encoder.rnn(take(encoder.embed_tokens(input_ids), order), None, lengths)
        layers = [take(one, back) for one in outputs]
        ended = torch.stack(ended if isinstance(ended, tuple) else (ended,))
        final = ended.unflatten(1, (config.encoder_layers, -1)).permute(3, 0, 1, 2, 4).flatten(3)
        first = decoder.bridge(final[:, decoder.recurrence.first_state :]).permute(1, 2, 0, 3)
        names = names_of(config)
        states = decoder.recurrence.start(tuple(first.unbind(0)))
        found = {
            "source_values": torch.stack(layers, dim=1) if config.attention == "context_as_state" else layers[-1],
            "source_keys": decoder.recurrence.keys(layers[-1]),
            "summary": final[:, 0, -1],
            **dict(zip([name for name in STATES if name in names], states, strict=True)),
        }
        return tuple(found[name] for name in names)


class Step(nn.Module):
    """One more token of every row, the source, and the state so far, each or None -> logits, and the state after it"""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids, attention_mask, place, source_values, source_keys, summary, state_h, state_c, state_fed
    ):
        decoder = self.model.model.decoder
        sources, rows = decoder_input_ids.shape
        real = attention_mask.bool()
        visible = real[:, None, None].expand(-1, rows, 1, -1)
        if place is not None:
            visible = visible & ((real.cumsum(dim=1) - 1)[:, None, None] <= place)
        if summary is not None:
            summary = summary[:, None].expand(-1, rows, -1).flatten(0, 1)
        source = Source(
            values=source_values,
            keys=source_values if source_keys is None else source_keys,
            visible=visible,
            lengths=real.sum(dim=1),
            summary=summary,
        )
        embeds = decoder.embed_tokens(decoder_input_ids.flatten()[:, None])
        state = tuple(part.flatten(1, 2) for part in (state_h, state_c, state_fed) if part is not None)
        step = decoder.recurrence(embeds, state, source)
        logits = self.model.lm_head(self.model.head_inputs(step.outputs[:, 0]))
        return logits.unflatten(0, (sources, rows)), *(part.unflatten(1, (sources, rows)) for part in step.state)


def graphs(model: DragomanRnnForConditionalGeneration) -> dict[str, tuple[nn.Module, dict, list[str]]]:
    """As `conversion.onnx.graphs`."""
    config, model = model.config, with_onnx_cells(model, model.config.cell).eval()
    encoder, step = Encoder(model), Step(model)
    ids = torch.full((2, 5), (config.source_vocab_size or config.vocab_size) - 1)
    mask = torch.ones_like(ids)
    names = names_of(config)
    with torch.no_grad():
        found: dict[str, Any] = dict(zip(names, encoder(ids, mask), strict=True))
    for name in STATES:
        if name in names:
            found[name] = found[name][:, :, None].repeat(1, 1, 4, 1)
    free: dict[str, tuple[int, ...]] = {
        "source_values": (0, 2 if config.attention == "context_as_state" else 1),
        "source_keys": (0, 1),
    }
    free |= {"summary": (0,), **dict.fromkeys(STATES, (1, 2))}
    return {
        "encoder": (encoder, {"input_ids": (ids, (0, 1)), "attention_mask": (mask, (0, 1))}, names),
        "decoder_step": (
            step,
            {
                "decoder_input_ids": (torch.zeros(2, 4, dtype=torch.long), (0, 1)),
                "attention_mask": (mask, (0, 1)),
                "place": (torch.tensor(0) if config.attention_direction == "unidirectional" else None, ()),
                **{name: (found.get(name), places) for name, places in free.items()},
            },
            ["logits", *(f"next_{name}" for name in STATES if name in names)],
        ),
    }
