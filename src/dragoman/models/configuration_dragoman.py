"""Configuration of the Transformer family."""

import math
from typing import Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .strict_config import check_numbers, check_vocabularies, strict_config


SIDES = ("encoder", "decoder")


@strict_config
class DragomanConfig(PreTrainedConfig):
    r"""
    Configuration of [`DragomanForConditionalGeneration`] and its relatives: a Transformer encoder-decoder.

    The defaults are a modern recipe (pre-norm RMSNorm, rotary positions, gated SiLU MLP, no biases); the historical
    recipes are presets (`transformer_2017`, `transformer_prenorm`, ...) that set every option their paper settles.

    Sizes:
        vocab_size: target vocabulary; also the source's unless `source_vocab_size` says otherwise.
        source_vocab_size: source vocabulary; `None` means the same as `vocab_size`.
        d_model: width of the residual stream.
        encoder_layers, decoder_layers: number of layers of each stack.
        encoder_attention_heads, decoder_attention_heads: number of query heads.
        encoder_num_key_value_heads, decoder_num_key_value_heads: key and value heads, a divisor of the query heads
            (grouped-query attention, Ainslie 2023); `None` means as many as query heads.
        encoder_head_dim, decoder_head_dim: width of a head; `None` means `d_model / heads`.
        encoder_ffn_dim, decoder_ffn_dim: inner width of the MLPs.
        max_position_embeddings: number of learned positions, a hard limit for `position_embedding_type="learned"`;
            for every other type only the length at which a fresh model's `generate()` gives up.

    Blocks:
        norm_type: `layernorm` (Ba 2016) or `rmsnorm` (Zhang and Sennrich 2019).
        norm_position: `post` is `Norm(x + Dropout(Sublayer(x)))` (Vaswani 2017, section 3.1), `pre` is
            `x + Dropout(Sublayer(Norm(x)))` (Xiong 2020).
        norm_eps: added to the variance.
        embedding_norm: normalize the embedded input of both stacks (BART).
        final_norm: normalize the output of both stacks.
        activation_function: a name known to Transformers (`relu`, `gelu`, `silu`, ...).
        gated_mlp: `down(act(gate(x)) * up(x))` (Shazeer 2020) instead of `down(act(up(x)))`.
        attention_bias, mlp_bias: biases in the projections.
        qk_norm: RMSNorm over each query and key head (Henry 2020).
        attention_scaling: factor on the scores; `None` means `head_dim ** -0.5` (Vaswani 2017, equation 1).
        attention_direction: `unidirectional` lets target step t see only source positions <= t; the default sees all.
        position_embedding_type: `sinusoidal` (Vaswani 2017, section 3.5), `learned`, `rotary` (Su 2021),
            `relative` (the bucketed biases of T5, Raffel 2020, section 2.1) or `none`.
        sinusoid_layout: `interleaved` (sine and cosine alternate), or `halves` (all sines, then all cosines).
        sinusoid_endpoint: the slowest wave has a frequency of 1/10000 exactly (tensor2tensor, M2M100); the default
            stops one step short of that, as Vaswani 2017 does.
        sinusoid_offset: number of the first position (M2M100 begins with `pad_token_id + 1`).
        rope_parameters: as everywhere in Transformers; `None` means `{"rope_type": "default", "rope_theta": 10000.0}`.
        relative_num_buckets, relative_max_distance: of the relative biases.
        scale_embedding: multiply the embeddings by `sqrt(d_model)` (Vaswani 2017, section 3.4).
        dropout: on embeddings and on the output of every sublayer; attention_dropout: on attention weights;
            activation_dropout: inside the MLPs; final_dropout: on the output of both stacks (T5); layerdrop: chance to
            skip a whole layer (Fan 2020).
        init_std: standard deviation of the initial weights; `None` means `fan_in ** -0.5`, which lets small models
            train as well as large ones. Queries and embeddings then make up for `attention_scaling` and `logit_scale`.

    Ends:
        share_embeddings: one table for source and target (needs equal vocabularies).
        tie_lm_head: the output layer is the target's embedding table (Press and Wolf 2017).
        tie_word_embeddings: Transformers' own master switch; `False` undoes both ties above.
        lm_head_bias: a bias on the logits.
        rotate_labels: where labels alone are given, the decoder begins with the last token of each row's labels, a
            language code or `</s>` (mBART, Liu 2020), instead of with `decoder_start_token_id`.
        logit_scale: factor on the decoder states before the output layer (T5 uses `d_model ** -0.5`); `None` means 1.
        label_smoothing: part of the target distribution spread over the vocabulary (Szegedy 2016), training only.

    Raises:
        ValueError: a value, or two values together, make no model; the message names both and what is allowed.
    """

    model_type = "dragoman"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "num_key_value_heads": "decoder_num_key_value_heads",
        "head_dim": "decoder_head_dim",
    }

    vocab_size: int = 32000
    source_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_num_key_value_heads: int | None = None
    decoder_num_key_value_heads: int | None = None
    encoder_head_dim: int | None = None
    decoder_head_dim: int | None = None
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    max_position_embeddings: int = 512

    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    final_norm: bool = True
    activation_function: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scaling: float | None = None
    attention_direction: Literal["bidirectional", "unidirectional"] = "bidirectional"
    position_embedding_type: Literal["sinusoidal", "learned", "rotary", "relative", "none"] = "rotary"
    sinusoid_layout: Literal["interleaved", "halves"] = "interleaved"
    sinusoid_endpoint: bool = False
    sinusoid_offset: int = 0
    rope_parameters: dict | None = None
    relative_num_buckets: int = 32
    relative_max_distance: int = 128
    scale_embedding: bool = False
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    final_dropout: float | int = 0.0
    layerdrop: float | int = 0.0
    init_std: float | None = None

    share_embeddings: bool = True
    tie_lm_head: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    rotate_labels: bool = False
    logit_scale: float | None = None
    label_smoothing: float | int = 0.0

    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0
    use_cache: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        for side in SIDES:
            heads = getattr(self, f"{side}_attention_heads")
            if getattr(self, f"{side}_num_key_value_heads") is None:
                setattr(self, f"{side}_num_key_value_heads", heads)
            if getattr(self, f"{side}_head_dim") is None:
                if heads < 1 or self.d_model % heads:
                    raise ValueError(
                        f"{side}_attention_heads={heads} does not divide d_model={self.d_model}: "
                        f"choose a divisor of d_model, or give {side}_head_dim."
                    )
                setattr(self, f"{side}_head_dim", self.d_model // heads)
        super().__post_init__(**kwargs)

    def validate_rope(self):
        # Transformers gives every config with this field default `rope_parameters`, and wants even heads of it then.
        if self.position_embedding_type != "rotary" or self.rope_parameters is None:
            return
        given = self.rope_parameters
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        kind = given.get("rope_type")
        if kind not in known:
            raise ValueError(f"rope_type={kind!r} in rope_parameters is unknown: choose one of {', '.join(known)}.")
        for name in ("rope_theta", "factor", "original_max_position_embeddings"):
            if name in given and not (isinstance(given[name], int | float) and 0 < given[name] < math.inf):
                raise ValueError(f"{name}={given[name]!r} in rope_parameters must be a positive number.")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor={given['partial_rotary_factor']} in rope_parameters must be 1.0: heads are "
                "turned as a whole."
            )
        try:
            super().validate_rope()
            for side in SIDES:
                if kind in ROPE_INIT_FUNCTIONS:
                    ROPE_INIT_FUNCTIONS[kind](self.get_text_config(**{side: True}))
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"rope_parameters={given} cannot turn heads of encoder_head_dim={self.encoder_head_dim} and "
                f"decoder_head_dim={self.decoder_head_dim}: {error}"
            ) from error

    def validate_architecture(self):
        """Refuses what cannot be built or contradicts itself. Called at construction and at saving."""
        per_side = [f"{side}_{size}" for side in SIDES for size in ("layers", "attention_heads", "head_dim", "ffn_dim")]
        chances = ("dropout", "attention_dropout", "activation_dropout", "final_dropout", "layerdrop")
        check_numbers(self, ("vocab_size", "d_model", *per_side), (*chances, "label_smoothing"))
        if self.max_position_embeddings < 2:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} must be at least 2, a start and a token."
            )
        for side in SIDES:
            heads, groups = getattr(self, f"{side}_attention_heads"), getattr(self, f"{side}_num_key_value_heads")
            if groups < 1 or heads % groups:
                raise ValueError(
                    f"{side}_num_key_value_heads={groups} does not divide {side}_attention_heads={heads}: "
                    "every key and value head serves the same number of query heads."
                )
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function={self.activation_function!r} is unknown: choose one of {sorted(ACT2FN)}."
            )
        check_vocabularies(self, starts_by_itself=self.rotate_labels)
        if self.position_embedding_type == "rotary":
            for side in SIDES:
                if getattr(self, f"{side}_head_dim") % 2:
                    raise ValueError(
                        f"{side}_head_dim={getattr(self, f'{side}_head_dim')} is odd, but position_embedding_type="
                        "'rotary' turns pairs of dimensions: choose an even head size (d_model divided by "
                        f"{side}_attention_heads unless it is given) or another position type."
                    )
        elif self.position_embedding_type == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} is odd, but position_embedding_type='sinusoidal' needs sine and cosine pairs: "
                "choose an even d_model or another position type."
            )
        elif self.position_embedding_type == "relative" and not (
            self.relative_num_buckets >= 4
            and self.relative_num_buckets % 2 == 0
            and self.relative_max_distance > self.relative_num_buckets // 2
        ):
            raise ValueError(
                f"relative_num_buckets={self.relative_num_buckets} must be even and at least 4, and "
                f"relative_max_distance={self.relative_max_distance} must exceed half of it."
            )
        for name in ("attention_scaling", "logit_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, or None for the usual one.")
        if self.sinusoid_offset < 0:
            raise ValueError(f"sinusoid_offset={self.sinusoid_offset} must be at least 0.")
        belongs_to = {
            "sinusoidal": ("sinusoid_layout", "sinusoid_endpoint", "sinusoid_offset"),
            "relative": ("relative_num_buckets", "relative_max_distance"),
        }
        for kind, names in belongs_to.items():
            for name in names:
                if self.position_embedding_type != kind and getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs position_embedding_type={kind!r}, not "
                        f"{self.position_embedding_type!r}."
                    )
        if self.sinusoid_endpoint and self.d_model < 4:
            raise ValueError(f"d_model={self.d_model} must be at least 4 for sinusoid_endpoint=True.")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be positive.")
