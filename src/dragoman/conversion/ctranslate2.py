"""A Transformer as a CTranslate2 model: the same weights under other names, quantized if wanted."""

from pathlib import Path
from typing import Any

import torch
from ctranslate2.specs import common_spec, transformer_spec
from ctranslate2.specs.attention_spec import RotaryScalingType
from torch import nn
from transformers import PreTrainedTokenizerBase

from dragoman.conversion.saved_settings import saved_settings, special_ids
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.models.configuration_dragoman import SIDES, DragomanConfig
from dragoman.models.modeling_dragoman import DragomanForConditionalGeneration


QUANTIZATIONS = ("float32", "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16")

ACTIVATIONS = {
    "relu": common_spec.Activation.RELU,
    "gelu": common_spec.Activation.GELU,
    "gelu_python": common_spec.Activation.GELU,
    "gelu_new": common_spec.Activation.GELUTanh,
    "gelu_fast": common_spec.Activation.GELUTanh,
    "gelu_pytorch_tanh": common_spec.Activation.GELUTanh,
    "gelu_python_tanh": common_spec.Activation.GELUTanh,
    "gelu_accurate": common_spec.Activation.GELUTanh,
    "quick_gelu": common_spec.Activation.GELUSigmoid,
    "silu": common_spec.Activation.SWISH,
    "swish": common_spec.Activation.SWISH,
    "tanh": common_spec.Activation.Tanh,
    "sigmoid": common_spec.Activation.Sigmoid,
}


def write(
    folder: Path, model: DragomanForConditionalGeneration, processing_class: ProcessingClass, quantization: str
) -> dict[str, Any]:
    """
    Writes `model.bin`, `config.json` and the vocabularies, which `ctranslate2.Translator` reads.

    Args:
        folder: exists and is empty.
        quantization: one of `QUANTIZATIONS`.

    Returns:
        the settings of decoding that the model was saved with, none of which these files can hold. They have room for
        one end token: several ends are among the settings then, and `translate_batch` takes them as `end_token`.

    Raises:
        ValueError: CTranslate2 cannot express some of the options, all of them named; or the tokenizer has more ids
            than the model.
    """
    config, ids = model.config, special_ids(model)
    problems = inexpressible(config)
    if problems:
        raise ValueError(f"CTranslate2 cannot express {', '.join(problems)}.")
    spec = specification(model)
    source, target = source_and_target_tokenizer(processing_class)
    tokens = vocabulary(target, config.vocab_size)
    spec.register_source_vocabulary(vocabulary(source, config.source_vocab_size or config.vocab_size))
    spec.register_target_vocabulary(tokens)
    start, ends = ids["decoder_start_token_id"], ids["eos_token_id"]
    names = {"bos_token": config.bos_token_id, "eos_token": next(iter(ends), None), "unk_token": target.unk_token_id}
    for name, number in names.items():
        if number is not None:
            setattr(spec.config, name, tokens[number])
    spec.config.decoder_start_token = None if start is None else tokens[start]
    spec.config.layer_norm_epsilon = config.norm_eps
    spec.validate()
    spec.optimize(quantization)
    spec.save(str(folder))
    settings = saved_settings(model)
    return {**settings, "eos_token_id": ends} if len(ends) > 1 else settings


def inexpressible(config: DragomanConfig) -> list[str]:
    """
    The options that CTranslate2 has no counterpart for, as `name=value`.

    Its norm of the queries treats each head by itself in self-attention, but in cross-attention all heads as one
    vector, which is the same for one head only. Of the rotary positions whose frequencies follow the length of the
    input it lacks `dynamic`, and its `longrope`, once it met a long input, keeps the long factors for short ones.
    """
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    checks = {
        "activation_function": config.activation_function not in ACTIVATIONS,
        "attention_direction": config.attention_direction != "bidirectional",
        "rope_parameters": config.position_embedding_type == "rotary" and rope in ("dynamic", "longrope"),
    }
    problems = [f"{name}={getattr(config, name)!r}" for name, wrong in checks.items() if wrong]
    if config.qk_norm and config.decoder_attention_heads > 1:
        problems.append(f"qk_norm=True with decoder_attention_heads={config.decoder_attention_heads}")
    return problems


def specification(model: DragomanForConditionalGeneration) -> Any:
    """The weights of the model in the places that CTranslate2 has for them."""
    config = model.config
    spec = transformer_spec.TransformerSpec(
        transformer_spec.TransformerEncoderSpec(config.encoder_layers, **_options(config, "encoder")),
        transformer_spec.TransformerDecoderSpec(config.decoder_layers, **_options(config, "decoder")),
    )
    for side in SIDES:
        stack, place = getattr(model.model, side), getattr(spec, side)
        embeddings = place.embeddings[0] if side == "encoder" else place.embeddings
        embeddings.weight = _numbers(stack.embed_tokens.weight).clone()  # quantizing would change the model's own
        place.pre_norm = config.norm_position == "pre"
        place.scale_embeddings = config.d_model**0.5 if config.scale_embedding else False
        if config.position_embedding_type in ("sinusoidal", "learned", "none"):
            place.position_encodings.encodings = _positions(stack)
        if config.embedding_norm:
            _norm(place.layernorm_embedding, stack.embedding_norm)
        if config.final_norm:
            _norm(place.layer_norm, stack.norm)
        for layer_place, layer in zip(place.layer, stack.layers, strict=True):
            _attention(layer_place.self_attention, layer.self_attn, [[*"qkv"]], layer.self_attn_norm)
            if side == "decoder":
                _attention(layer_place.attention, layer.cross_attn, [["q"], ["k", "v"]], layer.cross_attn_norm)
            if config.position_embedding_type == "rotary":
                _rotation(layer_place.self_attention, stack.rotary_emb)
            elif config.position_embedding_type == "relative":
                layer_place.self_attention.relative_attention_bias = _numbers(stack.relative_bias.weight.weight)
                layer_place.self_attention.relative_attention_max_distance = torch.tensor(
                    config.relative_max_distance, dtype=torch.int32
                ).numpy()
            _norm(layer_place.ffn.layer_norm, layer.mlp_norm)
            inner = layer.mlp.inner_projections()
            _linear(layer_place.ffn.linear_0, inner[:1])
            if config.gated_mlp:
                _linear(layer_place.ffn.linear_0_noact, inner[1:])
            _linear(layer_place.ffn.linear_1, [layer.mlp.down_proj])
    _linear(spec.decoder.projection, [model.lm_head])
    if config.logit_scale is not None:
        spec.decoder.scale_outputs = config.logit_scale
    return spec


def _options(config: DragomanConfig, side: str) -> dict[str, Any]:
    """The arguments of one stack's specification."""
    options: dict[str, Any] = {
        "num_heads": getattr(config, f"{side}_attention_heads"),
        "num_heads_kv": getattr(config, f"{side}_num_key_value_heads"),
        "head_dim": getattr(config, f"{side}_head_dim"),
        "pre_norm": True,  # or it would refuse a final norm
        "no_final_norm": not config.final_norm,
        "activation": ACTIVATIONS[config.activation_function],
        "layernorm_embedding": config.embedding_norm,
        "relative_attention_bias": config.position_embedding_type == "relative",
        "ffn_glu": config.gated_mlp,
        "rms_norm": config.norm_type == "rmsnorm",
        "qk_norm": config.qk_norm,
    }
    if config.position_embedding_type == "rotary":
        rope = config.get_text_config(**{side: True}).rope_parameters
        options |= {
            "rotary_dim": options["head_dim"],
            "rotary_interleave": False,
            "rotary_base": rope["rope_theta"],
        }
        if rope["rope_type"] == "linear":
            options |= {
                "rotary_scaling_type": RotaryScalingType.Linear,
                "rotary_scaling_factor": rope["factor"],
            }
        elif rope["rope_type"] != "default":
            options["rotary_scaling_type"] = RotaryScalingType.Su  # which `_rotation` completes
    return options


def _positions(stack: Any) -> torch.Tensor:
    """What the stack adds to the embeddings, (positions, D); zeros if it adds nothing. CTranslate2 has no formula."""
    count, width = stack.config.max_position_embeddings, stack.config.d_model
    if stack.embed_positions is None:
        return torch.zeros(count, width)
    return _numbers(stack.embed_positions(torch.arange(count)[None], torch.float32)[0])


def _attention(place: Any, attention: Any, groups: list[list[str]], norm: nn.Module) -> None:
    """Projections in groups that CTranslate2 computes at once, then the one of the output."""
    for linear, group in zip(place.linear, groups, strict=False):
        _linear(linear, [getattr(attention, f"{part}_proj") for part in group])
    _linear(place.linear[len(groups)], [attention.o_proj])
    place.queries_scale = attention.scaling
    _norm(place.layer_norm, norm)
    if attention.config.qk_norm:
        _norm(place.q_norm, attention.q_norm)
        _norm(place.k_norm, attention.k_norm)


def _rotation(place: Any, rotary: Any) -> None:
    """
    What the rotary options leave to say of positions that are scaled otherwise than linearly.

    CTranslate2 has a type of rotation, made for `longrope`, with a factor for each frequency, and without a length at
    which to begin it always takes the long ones: any fixed frequencies can be written so. A factor on sine and cosine
    of queries and keys alike is its square on the scores.
    """
    place.queries_scale *= rotary.attention_scaling**2
    if rotary.rope_type not in ("default", "linear"):
        usual, _ = rotary.compute_default_rope_parameters(rotary.config)
        place.rotary_scaling_long_factor = usual / _numbers(rotary.inv_freq)
        place.rotary_scaling_short_factor = place.rotary_scaling_long_factor


def _linear(place: Any, projections: list[nn.Module]) -> None:
    place.weight = torch.cat([_numbers(projection.weight) for projection in projections])
    if projections[0].bias is not None:
        place.bias = torch.cat([_numbers(projection.bias) for projection in projections])


def _norm(place: Any, norm: Any) -> None:
    place.gamma = _numbers(norm.weight)
    if isinstance(norm, nn.LayerNorm):
        place.beta = _numbers(norm.bias)


def _numbers(tensor: Any) -> torch.Tensor:
    return tensor.detach().float().cpu().contiguous()


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """The tokens of the ids 0 to size - 1; ids that the tokenizer does not have get a name that it cannot write."""
    tokens = [f"<unused_{number}>" for number in range(size)]
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            raise ValueError(
                f"the tokenizer has the id {number}, but the model's vocabulary has the ids 0 to {size - 1}: the "
                "tokenizer does not belong to this model."
            )
        tokens[number] = token
    return tokens
