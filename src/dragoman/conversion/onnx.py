"""
A Transformer as three ONNX graphs, which `onnx_generate.py` decodes with. Batch sizes and lengths are free in all of
them; ids and masks are int64, everything else float32:

    encoder.onnx          input_ids (B, S), attention_mask (B, S) -> encoder_states (B, S, D)
    decoder_prefill.onnx  decoder_input_ids (B, P), encoder_states, attention_mask
                          -> logits (B, V), self_keys and self_values (L, B, G, P, d), cross_keys and cross_values
                          (L, B, G, S, d)
    decoder_step.onnx     decoder_input_ids (B, g), attention_mask, self_keys and self_values (L, B, g, G, t, d),
                          cross_keys, cross_values
                          -> logits (B, g, V), next_self_keys and next_self_values (L, B, g, G, t + 1, d)
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dragoman.conversion import onnx_generate, onnx_rnn
from dragoman.conversion.saved_settings import saved_settings, special_ids
from dragoman.data.tokenizers import ProcessingClass
from dragoman.models.configuration_dragoman import DragomanConfig
from dragoman.models.configuration_dragoman_rnn import DragomanRnnConfig
from dragoman.models.modeling_dragoman import DragomanForConditionalGeneration


# Shapes: B sources, g target rows per source (beams), S source length, P tokens of the prompt, t tokens so far, D model
# width, L decoder layers, H query heads, G key and value heads, d head width, V target vocabulary.

QUANTIZATIONS = ("float32",)


def write(folder: Path, model: Any, processing_class: ProcessingClass, quantization: str) -> dict[str, Any]:
    """
    Writes the graphs, `settings.json` with the special ids and the settings of decoding, and `onnx_generate.py`, which
    needs onnxruntime and numpy alone.

    Args:
        folder: exists and is empty.
        model: with its head, of either family; `conversion/onnx_rnn.py` describes the graphs of the recurrent one.
        quantization: `float32`.

    Returns:
        the settings of decoding that the model was saved with and `onnx_generate.py` does not know.

    Raises:
        ValueError: rotary positions that are scaled by the length of the input.
    """
    problems = inexpressible(model.config)
    if problems:
        raise ValueError(f"ONNX graphs of any length cannot express {', '.join(problems)}.")
    of_family = graphs if isinstance(model, DragomanForConditionalGeneration) else onnx_rnn.graphs
    for name, (module, inputs, outputs) in of_family(model).items():
        export_graph(folder / f"{name}.onnx", module, inputs, outputs)
    settings = settings_of(model)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copy(onnx_generate.__file__, folder / "onnx_generate.py")
    return {name: value for name, value in saved_settings(model).items() if name not in settings}


def graphs(model: DragomanForConditionalGeneration) -> dict[str, tuple[nn.Module, dict[str, Any], list[str]]]:
    """What computes each graph, its inputs by name, each a sample and the dimensions that are free, and its outputs."""
    config = model.config
    sample = torch.full((2, 5), config.vocab_size - 1)
    mask = torch.ones_like(sample)
    with torch.no_grad():
        encoder, prefill, step = Encoder(model).eval(), Prefill(model).eval(), Step(model).eval()
        source = torch.full((2, 5), (config.source_vocab_size or config.vocab_size) - 1)
        states = encoder(source, mask)
        prompt = sample[:, :3].contiguous()
        _, self_keys, self_values, *cross = prefill(prompt, states, mask)
        past = [past[:, :, None].repeat(1, 1, 4, 1, 1, 1) for past in (self_keys, self_values)]
    cross_names, past_names = ["cross_keys", "cross_values"], ["self_keys", "self_values"]
    return {
        "encoder": (encoder, {"input_ids": (source, (0, 1)), "attention_mask": (mask, (0, 1))}, ["encoder_states"]),
        "decoder_prefill": (
            prefill,
            {
                "decoder_input_ids": (prompt, (0, 1)),
                "encoder_states": (states, (0, 1)),
                "attention_mask": (mask, (0, 1)),
            },
            ["logits", *past_names, *cross_names],
        ),
        "decoder_step": (
            step,
            {
                "decoder_input_ids": (sample[:, :4].contiguous(), (0, 1)),
                "attention_mask": (mask, (0, 1)),
                **{name: (tensor, (1, 2, 4)) for name, tensor in zip(past_names, past, strict=True)},
                **{name: (tensor, (1, 3)) for name, tensor in zip(cross_names, cross, strict=True)},
            },
            ["logits", *(f"next_{name}" for name in past_names)],
        ),
    }


def inexpressible(config: DragomanConfig | DragomanRnnConfig) -> list[str]:
    """The options that are not the same for every length of input, as `name=value`."""
    if isinstance(config, DragomanRnnConfig):
        return []
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if config.position_embedding_type == "rotary" and rope in ("dynamic", "longrope"):
        return [f"rope_parameters={config.rope_parameters!r}"]
    return []


def export_graph(path: Path, module: nn.Module, inputs: dict[str, Any], outputs: list[str]):
    """One graph, as `graphs` describes it; an input without a sample is none."""
    free = torch.export.Dim.DYNAMIC
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program: Any = torch.onnx.export(
            module,
            tuple(sample for sample, _ in inputs.values()),
            dynamo=True,
            input_names=[name for name, (sample, _) in inputs.items() if sample is not None],
            output_names=outputs,
            dynamic_shapes=tuple(
                None if sample is None else dict.fromkeys(places, free) for sample, places in inputs.values()
            ),
            verbose=False,
        )
    program.save(path)


def settings_of(model: Any) -> dict[str, Any]:
    """What decoding needs to know, as `model.generate()` has it."""
    saved, config = model.generation_config, model.config
    recurrent = isinstance(config, DragomanRnnConfig)
    longest = config.max_target_length if recurrent else config.max_position_embeddings
    settings = {
        **special_ids(model),
        "max_new_tokens": saved.max_new_tokens,
        "max_length": saved.max_length or longest,  # with the start token, where there is no max_new_tokens
        "num_beams": saved.num_beams or 1,
        "length_penalty": 1.0 if saved.length_penalty is None else saved.length_penalty,
        "early_stopping": saved.early_stopping or False,
        "forced_bos_token_id": saved.forced_bos_token_id,
        "forced_eos_token_id": saved.forced_eos_token_id,
        "suppress_tokens": saved.suppress_tokens or [],
        "renormalize_logits": saved.renormalize_logits or False,
    }
    bad = saved.bad_words_ids or []
    if bad and all(len(ids) == 1 for ids in bad):  # as those of Marian: [[pad]]
        settings["bad_words_ids"] = bad
    return settings


class Encoder(nn.Module):
    """Source ids and mask (B, S) -> states (B, S, D)"""

    def __init__(self, model: DragomanForConditionalGeneration):
        super().__init__()
        self.stack: Any = model.model.encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        x, angles = self.stack.enter(self.stack.embed_tokens(input_ids), positions)
        bias = hide_padding(attention_mask, x)
        if self.stack.relative_bias is not None:
            length = input_ids.shape[1]
            bias = bias + self.stack.relative_bias(torch.arange(length), length)
        for layer in self.stack.layers:

            def attend(x, attention=layer.self_attn):
                query, key, value = to_heads(attention, x, "qkv")
                query, key = attention.turn(query, key, angles)
                return weighted_sum(attention, query, key, value, bias)

            x = layer.residual(x, layer.self_attn_norm, layer.dropout, attend)
            x = layer.residual(x, layer.mlp_norm, layer.dropout, layer.mlp)
        return self.stack.norm(x)


class Decoder(nn.Module):
    """What the first and every further step have in common."""

    def __init__(self, model: DragomanForConditionalGeneration):
        super().__init__()
        self.model: Any = model

    def run(self, ids, positions, attention_mask, past, cross, self_bias):
        """
        Target ids (N, T) at positions (T,), past keys and values (N, G, t, d) of each layer or nothing, those of the
        source (B, G, S, d) -> logits (N, V) of the last ids, keys and values (L, N, G, t + T, d)
        """
        stack = self.model.model.decoder
        x, angles = stack.enter(stack.embed_tokens(ids), positions[None])
        source_bias = hide_padding(attention_mask, x)  # (B, 1, 1, S)
        if self.model.config.attention_direction == "unidirectional":
            # Counted over real tokens, so that padding on the left changes nothing: (B, 1, T, S)
            ahead = (attention_mask.cumsum(dim=1) - 1)[:, None, None] > positions[:, None]
            source_bias = source_bias + torch.zeros_like(ahead, dtype=x.dtype).masked_fill(ahead, lowest(x))
        keys, values = [], []
        for number, layer in enumerate(stack.layers):

            def to_target(x, attention=layer.self_attn, number=number):
                query, key, value = to_heads(attention, x, "qkv")
                query, key = attention.turn(query, key, angles)
                if past is not None:
                    key, value = (
                        torch.cat((old[number], new), dim=2) for old, new in zip(past, (key, value), strict=True)
                    )
                keys.append(key)
                values.append(value)
                return weighted_sum(attention, query, key, value, self_bias)

            def to_source(x, attention=layer.cross_attn, number=number):
                key, value = (part[number] for part in cross)
                folded = x.reshape(key.shape[0], -1, x.shape[-1])  # the rows of a source share its keys
                (query,) = to_heads(attention, folded, "q")
                return weighted_sum(attention, query, key, value, source_bias).reshape(x.shape)

            x = layer.residual(x, layer.self_attn_norm, layer.dropout, to_target)
            x = layer.residual(x, layer.cross_attn_norm, layer.dropout, to_source)
            x = layer.residual(x, layer.mlp_norm, layer.dropout, layer.mlp)
        logits = self.model.lm_head(self.model.head_inputs(stack.norm(x[:, -1])))
        return logits, torch.stack(keys), torch.stack(values)


class Prefill(Decoder):
    """Prompt, states and mask -> logits, and the keys and values of target and source"""

    def forward(self, decoder_input_ids, encoder_states, attention_mask):
        stack, length = self.model.model.decoder, decoder_input_ids.shape[1]
        source = [to_heads(layer.cross_attn, encoder_states, "kv") for layer in stack.layers]
        cross_keys, cross_values = (torch.stack(parts) for parts in zip(*source, strict=True))
        positions = torch.arange(length)
        ahead = positions > positions[:, None]
        bias = torch.zeros_like(ahead, dtype=encoder_states.dtype).masked_fill(ahead, lowest(encoder_states))
        if stack.relative_bias is not None:
            bias = bias + stack.relative_bias(positions, length)
        cross = (cross_keys, cross_values)
        return (*self.run(decoder_input_ids, positions, attention_mask, None, cross, bias), *cross)


class Step(Decoder):
    """One more token of every row, and the keys and values so far -> logits, and the keys and values with it"""

    def forward(self, decoder_input_ids, attention_mask, self_keys, self_values, cross_keys, cross_values):
        stack, (sources, rows) = self.model.model.decoder, decoder_input_ids.shape
        place = self_keys.shape[4]
        positions = torch.arange(place, place + 1)
        bias = None if stack.relative_bias is None else stack.relative_bias(positions, place + 1)
        logits, keys, values = self.run(
            decoder_input_ids.flatten()[:, None],
            positions,
            attention_mask,
            (self_keys.flatten(1, 2), self_values.flatten(1, 2)),
            (cross_keys, cross_values),
            bias,
        )
        return (logits.unflatten(0, (sources, rows)), *(part.unflatten(1, (sources, rows)) for part in (keys, values)))


def to_heads(attention: Any, x: torch.Tensor, parts: str) -> list[torch.Tensor]:
    """(N, T, D) -> for each of the parts q, k, v (N, heads, T, d)"""
    norms = {"q": attention.q_norm, "k": attention.k_norm, "v": nn.Identity()}
    projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    return [norms[part](attention.split_heads(projections[part](x))) for part in parts]


def weighted_sum(attention: Any, query, key, value, bias) -> torch.Tensor:
    """(N, H, T, d), two (N, G, K, d), bias (N or 1, 1 or H, T or 1, K) or None -> (N, T, D)"""
    shared = attention.num_key_value_groups
    key, value = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (key, value))
    scores = query @ key.transpose(2, 3) * attention.scaling
    scores = scores if bias is None else scores + bias
    return attention.o_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


def hide_padding(attention_mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, S) -> what is added to the scores, (B, 1, 1, S)"""
    return ((1 - attention_mask).to(x.dtype) * lowest(x))[:, None, None]


def lowest(x: torch.Tensor) -> float:
    """Hides a score, also if two of it are added."""
    return torch.finfo(x.dtype).min / 4
