"""
The Transformer family: a bidirectional encoder, a causal decoder with cross-attention, and a language-model head.

Reads top-down: norms and MLPs, residual connections, layers, stacks, models. Attention, positions and masks have files
of their own beside this one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import DragomanCrossAttention, DragomanSelfAttention, ScaledQuery
from .configuration_dragoman import DragomanConfig
from .decoding_steps import ForwardSteps, TransformerSteps, can_be_lean
from .embeddings import DragomanScaledEmbedding, TokenTables
from .fast_linear import Linear
from .generation import DragomanGenerationMixin
from .language_model_head import LanguageModelHead
from .loss import rotate_labels
from .masks import cross_mask, decoder_self_mask, encoder_self_mask
from .positions import (
    DragomanRotaryEmbedding,
    LearnedPositions,
    RelativePositionBias,
    SinusoidalPositions,
    count_positions,
)


# Shapes: B sources, g target rows per source (beams), S source length, T target length, D model width, V vocabulary.


def make_norm(config: DragomanConfig) -> nn.Module:
    return {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[config.norm_type](config.d_model, eps=config.norm_eps)


class DragomanMLP(nn.Module):
    """down(act(up(x))): the feed-forward sublayer of Vaswani 2017, equation 2."""

    def __init__(self, config: DragomanConfig, ffn_dim: int):
        super().__init__()
        self.up_proj = Linear(config.d_model, ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(ffn_dim, config.d_model, bias=config.mlp_bias)
        self.activation = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.activation_dropout)

    def inner_projections(self) -> list[nn.Module]:
        return [self.up_proj]

    def bend(self, up: torch.Tensor) -> torch.Tensor:
        """What the inner projections give -> what `down_proj` takes, without dropout."""
        return self.activation(up)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.bend(*(projection(hidden_states) for projection in self.inner_projections()))
        return self.down_proj(self.dropout(inner))


class DragomanGatedMLP(DragomanMLP):
    """down(act(gate(x)) * up(x)): Shazeer 2020, equation 6."""

    def __init__(self, config: DragomanConfig, ffn_dim: int):
        super().__init__(config, ffn_dim)
        self.gate_proj = Linear(config.d_model, ffn_dim, bias=config.mlp_bias)

    def inner_projections(self) -> list[nn.Module]:
        return [self.gate_proj, self.up_proj]

    def bend(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.activation(gate) * up


def make_mlp(config: DragomanConfig, ffn_dim: int) -> DragomanMLP:
    return (DragomanGatedMLP if config.gated_mlp else DragomanMLP)(config, ffn_dim)


def pre_norm(hidden_states, norm, dropout, sublayer):
    """x + Dropout(Sublayer(Norm(x))) (Xiong 2020)"""
    return hidden_states + dropout(sublayer(norm(hidden_states)))


def post_norm(hidden_states, norm, dropout, sublayer):
    """Norm(x + Dropout(Sublayer(x))) (Vaswani 2017, section 3.1)"""
    return norm(hidden_states + dropout(sublayer(hidden_states)))


RESIDUALS = {"pre": pre_norm, "post": post_norm}


class DragomanEncoderLayer(GradientCheckpointingLayer):
    """Self-attention over the whole source, then an MLP."""

    def __init__(self, config: DragomanConfig, layer_idx: int):
        super().__init__()
        self.residual = RESIDUALS[config.norm_position]
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = DragomanSelfAttention(config, "encoder", layer_idx, is_causal=False)
        self.self_attn_norm = make_norm(config)
        self.mlp = make_mlp(config, config.encoder_ffn_dim)
        self.mlp_norm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor | None = None,  # positional, or gradient checkpointing would not track it
        rotary_angles=None,
        **kwargs,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)"""

        def attend(x):
            return self.self_attn(x, attention_mask, rotary_angles, position_bias=position_bias, **kwargs)[0]

        hidden_states = self.residual(hidden_states, self.self_attn_norm, self.dropout, attend)
        return self.residual(hidden_states, self.mlp_norm, self.dropout, self.mlp)


class DragomanDecoderLayer(GradientCheckpointingLayer):
    """Self-attention over the target so far, cross-attention to the source, then an MLP."""

    def __init__(self, config: DragomanConfig, layer_idx: int):
        super().__init__()
        self.residual = RESIDUALS[config.norm_position]
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = DragomanSelfAttention(config, "decoder", layer_idx, is_causal=True)
        self.self_attn_norm = make_norm(config)
        self.cross_attn = DragomanCrossAttention(config, layer_idx)
        self.cross_attn_norm = make_norm(config)
        self.mlp = make_mlp(config, config.decoder_ffn_dim)
        self.mlp_norm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,  # positional as position_bias is, for the same reason
        cross_attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        rotary_angles=None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(B * g, T, D), source (B, S, D) -> (B * g, T, D)"""

        def attend_to_target(x):
            return self.self_attn(
                x, attention_mask, rotary_angles, past_key_values, position_bias=position_bias, **kwargs
            )[0]

        def attend_to_source(x):
            return self.cross_attn(x, cross_attention_mask, encoder_hidden_states, past_key_values, **kwargs)[0]

        hidden_states = self.residual(hidden_states, self.self_attn_norm, self.dropout, attend_to_target)
        hidden_states = self.residual(hidden_states, self.cross_attn_norm, self.dropout, attend_to_source)
        return self.residual(hidden_states, self.mlp_norm, self.dropout, self.mlp)


class DragomanPreTrainedModel(PreTrainedModel):
    """What all models of the family tell Transformers about themselves."""

    config: DragomanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DragomanEncoderLayer", "DragomanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Transformers has one set of lengths for all attention of a forward; "varlen" brings three to such kernels.
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    # Its sharding shifts labels and wants causal masks everywhere.
    _supports_context_parallel = False

    def _init_weights(self, module: nn.Module):
        """
        Weights with a standard deviation of fan_in ** -0.5, embeddings of d_model ** -0.5, or all of `init_std`.
        Scores and logits start out as large with an `attention_scaling` and a `logit_scale` as without: for T5 this is
        the initialization of Raffel 2020.
        """
        if isinstance(module, nn.Linear):
            gain = module.gain if isinstance(module, ScaledQuery) else 1.0
            init.normal_(module.weight, std=self.config.init_std or module.in_features**-0.5 * gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            std = self.config.d_model**-0.5 / (self.config.logit_scale or 1.0)
            init.normal_(module.weight, std=self.config.init_std or std)
        else:
            super()._init_weights(module)


class DragomanStack(DragomanPreTrainedModel):
    """Embeddings, layers and final norm: what the encoder and the decoder have in common."""

    attentions: tuple[str, ...] = ("self_attn",)
    _tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}

    def __init__(self, config: DragomanConfig, side: str, vocab_size: int, layers: Iterable[nn.Module]):
        super().__init__(config)
        embedding = DragomanScaledEmbedding if config.scale_embedding else nn.Embedding
        self.embed_tokens = embedding(vocab_size, config.d_model)
        self.embed_positions = {
            "sinusoidal": lambda: SinusoidalPositions(
                config.d_model, config.sinusoid_layout, config.sinusoid_endpoint, config.sinusoid_offset
            ),
            "learned": lambda: LearnedPositions(config.max_position_embeddings, config.d_model),
        }.get(config.position_embedding_type, lambda: None)()
        self.rotary_emb = None
        if config.position_embedding_type == "rotary":
            self.rotary_emb = DragomanRotaryEmbedding(config.get_text_config(**{side: True}))
        self.relative_bias = None
        if config.position_embedding_type == "relative":
            self.relative_bias = RelativePositionBias(
                getattr(config, f"{side}_attention_heads"),
                config.relative_num_buckets,
                config.relative_max_distance,
                bidirectional=side == "encoder",
            )
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.final_dropout = nn.Dropout(config.final_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def init_parallel_plans(self):
        """Tensor parallelism (Shoeybi 2019): every process has some heads, and some columns of the MLPs."""
        super().init_parallel_plans()
        if self.config.gated_mlp:
            self._tp_plan["layers.*.mlp.gate_proj"] = "colwise"
        for name in self.attentions:
            # Relative biases belong to the heads and are not split, so neither is the attention that takes them.
            if name == "self_attn" and self.relative_bias is not None:
                continue
            attention = f"layers.*.{name}"
            self._tp_plan.update({f"{attention}.{part}_proj": "colwise" for part in "qkv"})
            self._tp_plan[f"{attention}.o_proj"] = "rowwise"
            if self.config.qk_norm:
                norms = {f"{attention}.{part}_norm": "replicated_with_grad_allreduce" for part in "qk"}
                self._tp_plan.update(norms)

    def embed(self, input_ids, inputs_embeds) -> torch.Tensor:
        """(B, T) ids, or their embeddings -> (B, T, D)"""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs either token ids or embeddings, and not both.")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def positions(self, embeds, position_ids, attention_mask, segment_ids, past_length=0) -> torch.Tensor:
        """Positions (B or 1, T): those given, else counted."""
        if isinstance(self.embed_positions, LearnedPositions) and isinstance(past_length, int):
            length, limit = past_length + embeds.shape[1], self.config.max_position_embeddings
            if length > limit:
                raise ValueError(
                    f"{type(self).__name__} got a sequence of {length} tokens, but it has learned {limit} positions "
                    "(max_position_embeddings): shorten the sequence, or train with more positions."
                )
        if position_ids is not None:
            return position_ids
        return count_positions(embeds, attention_mask, segment_ids, past_length)

    def enter(self, embeds, position_ids) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """What the first layer receives (B, T, D), and the rotary angles for every layer."""
        if self.embed_positions is not None:
            embeds = embeds + self.embed_positions(position_ids, embeds.dtype)
        angles = None if self.rotary_emb is None else self.rotary_emb(embeds, position_ids)
        return self.dropout(self.embedding_norm(embeds)), angles

    def bias_of_positions(self, embeds, past_key_values: EncoderDecoderCache | None = None) -> torch.Tensor | None:
        """Relative biases (1, H, T, K) for every layer, or None. Places are counted in the row, padding included."""
        if self.relative_bias is None:
            return None
        length = num_keys = embeds.shape[1]
        places = torch.arange(length, device=embeds.device)
        if past_key_values is not None:
            num_keys, _ = past_key_values.get_mask_sizes(length, 0)
            places = places + past_key_values.get_seq_length()
        bias = self.relative_bias(places, num_keys)
        # Flex attention reads it by row and does not broadcast.
        return bias.expand(len(embeds), -1, -1, -1) if self.config._attn_implementation == "flex_attention" else bias

    def remaining_layers(self):
        """All layers; in training each is left out with probability `layerdrop` (Fan 2020)."""
        for layer in self.layers:
            if not (self.training and self.config.layerdrop and torch.rand([]) < self.config.layerdrop):
                yield layer


class DragomanEncoder(DragomanStack):
    """Source tokens -> source states."""

    _can_record_outputs = {"hidden_states": DragomanEncoderLayer, "attentions": DragomanSelfAttention}

    def __init__(self, config: DragomanConfig):
        layers = [DragomanEncoderLayer(config, index) for index in range(config.encoder_layers)]
        super().__init__(config, "encoder", config.source_vocab_size or config.vocab_size, layers)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """(B, S) -> `last_hidden_state` (B, S, D)"""
        embeds = self.embed(input_ids, inputs_embeds)
        position_ids = self.positions(embeds, position_ids, attention_mask, segment_ids)
        mask = encoder_self_mask(self.config, embeds, attention_mask, segment_ids)
        position_bias = self.bias_of_positions(embeds)
        hidden_states, angles = self.enter(embeds, position_ids)
        for layer in self.remaining_layers():
            hidden_states = layer(hidden_states, mask, position_bias, rotary_angles=angles, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_dropout(self.norm(hidden_states)))


class DragomanDecoder(DragomanStack):
    """Target tokens so far and source states -> target states, each for predicting the next token."""

    attentions = ("self_attn", "cross_attn")
    _can_record_outputs = {
        "hidden_states": DragomanDecoderLayer,
        "attentions": OutputRecorder(DragomanSelfAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(DragomanCrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: DragomanConfig):
        layers = [DragomanDecoderLayer(config, index) for index in range(config.decoder_layers)]
        super().__init__(config, "decoder", config.vocab_size, layers)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        encoder_segment_ids: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(B * g, T) and source states (B, S, D) -> `last_hidden_state` (B * g, T, D)"""
        embeds = self.embed(input_ids, inputs_embeds)
        if encoder_hidden_states is None:
            raise ValueError("The decoder needs encoder_hidden_states: run the encoder first.")
        if embeds.shape[0] % encoder_hidden_states.shape[0]:
            raise ValueError(
                f"{embeds.shape[0]} target rows cannot share {encoder_hidden_states.shape[0]} sources evenly."
            )
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, but this decoder keeps source and target "
                "apart: give an EncoderDecoderCache, or leave it out."
            )
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = self.positions(embeds, position_ids, attention_mask, segment_ids, past_length)
        mask = decoder_self_mask(self.config, embeds, attention_mask, past_key_values, segment_ids)
        source_mask = cross_mask(
            self.config,
            embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            cross_attention_mask,
            position_ids,
            segment_ids,
            encoder_segment_ids,
        )
        position_bias = self.bias_of_positions(embeds, past_key_values)
        hidden_states, angles = self.enter(embeds, position_ids)
        for layer in self.remaining_layers():
            hidden_states = layer(
                hidden_states,
                mask,
                encoder_hidden_states,
                source_mask,
                position_bias,
                rotary_angles=angles,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.final_dropout(self.norm(hidden_states)),
            past_key_values=past_key_values if use_cache else None,
        )


class DragomanModel(TokenTables, DragomanPreTrainedModel):
    """Encoder and decoder without a head: token ids in, decoder states out."""

    def __init__(self, config: DragomanConfig):
        super().__init__(config)
        # On the instance, because the two ties are independent of each other.
        self._tied_weights_keys = (
            {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"} if config.share_embeddings else {}
        )
        self.encoder = DragomanEncoder(config)
        self.decoder = DragomanDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids (B, S), or inputs_embeds (B, S, D), or encoder_outputs from an earlier call.
            attention_mask: true for real source tokens (B, S); or 4-D, boolean or additive, (B, 1, S or 1, S).
            decoder_input_ids (B, T), or decoder_inputs_embeds (B, T, D): the target, beginning with the start token.
            decoder_attention_mask: true for real target tokens (B, past + T); or 4-D, (B, 1, T, past + T).
            cross_attention_mask: 4-D only, (B, 1, T or 1, S); made from `attention_mask` where it is not given.
            position_ids (B, S), decoder_position_ids (B, T): counted where they are not given.
            segment_ids (B, S), decoder_segment_ids (B, T): numbers of the pairs packed into a row; attention stays
                inside a pair. Sources of one segment need none for their targets.

        Returns:
            `last_hidden_state` (B, T, D), `encoder_last_hidden_state` (B, S, D) and what was asked for.

        Raises:
            ValueError: no target input; a sequence longer than the learned positions; segments of one side alone.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "The decoder has no input: give labels, or decoder_input_ids, or decoder_inputs_embeds. "
                "(A collator made as DataCollatorForSeq2Seq(tokenizer, model=model) adds decoder_input_ids.)"
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                segment_ids=segment_ids,
                **kwargs,
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cross_attention_mask=cross_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            position_ids=decoder_position_ids,
            segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class DragomanEncoderModel(DragomanPreTrainedModel):
    """The encoder alone, with a sentence vector: the mean of its states over the real tokens."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: DragomanConfig):
        super().__init__(config)
        self.encoder = DragomanEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: Any):
        self.encoder.embed_tokens = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the host's; where the source has a vocabulary of its own, that is the one that changes."""
        before = self.config.vocab_size
        table = super().resize_token_embeddings(*args, **kwargs)
        if self.config.source_vocab_size is not None and not self.config.share_embeddings:
            self.config.source_vocab_size, self.config.vocab_size = table.num_embeddings, before
        return table

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """(B, S) and its mask (B, S) -> `last_hidden_state` (B, S, D), `pooler_output` (B, D)"""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions, but the mean over the real tokens needs a mask "
                "of (rows, length)."
            )
        outputs = self.encoder(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )
        states = outputs.last_hidden_state
        if attention_mask is None:
            pooled = states.mean(dim=1)
        else:
            weights = attention_mask.to(states.dtype)[..., None]
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def bucket(length: int, config: DragomanConfig) -> int:
    """The next power of two from 32 on, but no more than the model has learned positions."""
    longer = max(32, 1 << (length - 1).bit_length())
    learned = config.position_embedding_type == "learned"
    return max(length, min(longer, config.max_position_embeddings)) if learned else longer


class DragomanForConditionalGeneration(LanguageModelHead, DragomanPreTrainedModel, DragomanGenerationMixin):
    """The model to train and to translate with: encoder, decoder and an output layer over the target vocabulary."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DragomanConfig):
        super().__init__(config)
        self._tied_weights_keys = self.head_tie()
        self.model = DragomanModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
        # Without a length, stock generate() stops after 20 tokens. Training writes one that fits its data.
        if self.generation_config.max_length is None:
            self.generation_config.max_length = config.max_position_embeddings

    def head_inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Decoder states (B, T, D) as the output layer takes them."""
        return states if self.config.logit_scale is None else states * self.config.logit_scale

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        if self.config.rotate_labels:
            return rotate_labels(labels, self.config.pad_token_id)
        return super().prepare_decoder_input_ids_from_labels(labels)

    def decoding_steps(self, prompt, model_kwargs, g: int, *, with_states: bool = False, tree: bool = True):
        if self.is_of_this_file() and can_be_lean(self, model_kwargs):
            return TransformerSteps(self, prompt, model_kwargs, g, with_states, tree)
        return ForwardSteps(self, prompt, model_kwargs, g, with_states)

    def is_of_this_file(self) -> bool:
        """Whether what a lean step does not call is what this file says, and nobody's subclass or substitute."""
        names = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "target_arguments")
        return (
            all(getattr(type(self), name) is getattr(DragomanForConditionalGeneration, name) for name in names)
            and type(self.model) is DragomanModel
            and type(self.model.decoder) is DragomanDecoder
            and type(self.model.decoder.relative_bias) in (RelativePositionBias, type(None))
            and all(
                type(layer) is DragomanDecoderLayer
                and type(layer.self_attn) is DragomanSelfAttention
                and type(layer.cross_attn) is DragomanCrossAttention
                and type(layer.mlp) in (DragomanMLP, DragomanGatedMLP)
                for layer in self.model.decoder.layers
            )
        )

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, *, inputs_tensor, model_kwargs, **arguments):
        """
        Runs the encoder. Beside a static cache it gets sources of few lengths, so that few are compiled, unless states
        or weights of as many positions as the source has are asked for.
        """
        config = arguments["generation_config"]
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        per_token = model_kwargs.keys() & {"position_ids", "segment_ids"}
        static = "static" in (config.cache_implementation or "")
        seen = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
        if static and mask.ndim == 2 and not per_token and not seen:
            padding = bucket(mask.shape[1], self.config) - mask.shape[1]
            model_kwargs = {**model_kwargs, "attention_mask": nn.functional.pad(mask, (0, padding))}
            around = (0, 0) * (inputs_tensor.ndim - 2)  # embeddings have a width
            pad = self.config.pad_token_id if inputs_tensor.ndim == 2 else 0
            inputs_tensor = nn.functional.pad(inputs_tensor, (*around, 0, padding), value=pad)
        return super()._prepare_text_encoder_decoder_kwargs_for_generation(
            inputs_tensor=inputs_tensor, model_kwargs=model_kwargs, **arguments
        )

    def prepare_inputs_for_generation(self, input_ids, decoder_attention_mask=None, **kwargs):
        """As the host's, and positions that do not count the padding of a prompt, which a static cache would hide."""
        if decoder_attention_mask is not None and decoder_attention_mask.ndim == 2:
            kwargs.setdefault("decoder_position_ids", count_positions(decoder_attention_mask, decoder_attention_mask))
        return super().prepare_inputs_for_generation(input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs)
