"""
The recurrent family: LSTM, GRU and plain RNN encoder-decoders with the attentions of 2014 and 2015.

Reads top-down: reading the source, encoder, decoder, models. What happens within a step of the decoder (the recurrence
and its attention), scheduled sampling and the cache have files of their own beside this one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, Seq2SeqModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_dragoman_rnn import DragomanRnnConfig
from .embeddings import TokenTables
from .fast_linear import Linear
from .generation import DragomanGenerationMixin
from .language_model_head import LanguageModelHead
from .recurrent_attention import Source, Step, make_recurrence, make_rnn, run
from .recurrent_cache import DragomanRecurrentCache
from .scheduled_sampling import ScheduledSampling


# Shapes: B sources, g target rows per source (beams), S source length, T target length, L layers, N states of a cell
# (h and c of an LSTM: 2; else 1), E embedding width, D hidden size, V vocabulary.


@dataclass
class DragomanRnnEncoderOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: (B, S, D), in the order of the source; zero at padding.
        final_state: (B, N, L, D), what every layer knows after the last token it read.
        layer_states: (B, L, S, D), `last_hidden_state` of every layer, where the decoder attends to all of them.
        hidden_states: the embeddings (B, S, E) and `last_hidden_state` of every layer, if asked for.
        attentions: always None.
    """

    last_hidden_state: torch.Tensor | None = None
    final_state: torch.Tensor | None = None
    layer_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def reading_order(real: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Mask (B, S) -> positions (B, S) in the order of reading: real tokens, then padding, which keeps its order."""
    length = real.shape[1]
    places = torch.arange(length, device=real.device).expand_as(real)
    return torch.where(real, length - 1 - places if backwards else places, length + places).argsort(dim=1)


def take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(B, S, D), positions (B, S) -> (B, S, D)"""
    return x.gather(1, order[..., None].expand_as(x))


def run_layers(rnn: nn.RNNBase, packed: PackedSequence) -> tuple[list[PackedSequence], tuple[torch.Tensor, ...]]:
    """As `run` from a zero state, but keeping the outputs of all layers."""
    one_layer: Any = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[type(rnn)]
    directions = 2 if rnn.bidirectional else 1
    zeros = packed.data.new_zeros(directions, int(packed.batch_sizes[0]), rnn.hidden_size)
    start = (zeros, zeros) if isinstance(rnn, nn.LSTM) else zeros
    data, layers, finals = packed.data, [], []
    for layer in range(rnn.num_layers):
        weights = [
            weight for group in rnn.all_weights[layer * directions : (layer + 1) * directions] for weight in group
        ]
        if layer > 0:
            data = nn.functional.dropout(data, rnn.dropout, rnn.training)
        data, *final = one_layer(
            data, packed.batch_sizes, start, weights, True, 1, 0.0, rnn.training, rnn.bidirectional
        )
        layers.append(packed._replace(data=data))
        finals.append([state[:, packed.unsorted_indices] for state in final])
    return layers, tuple(torch.cat(states) for states in zip(*finals, strict=True))


class DragomanRnnBridge(nn.Module):
    """
    The decoder's first state, learned from the encoder's last: h = tanh(W h'), c = W c' (Bahdanau 2015, A.2.2).

    Each layer starts from its counterpart, or all from the topmost where the numbers of layers differ.
    """

    def __init__(self, config: DragomanRnnConfig, names: tuple[str, ...]):
        super().__init__()
        self.paired = config.encoder_layers == config.decoder_layers
        self.projections = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    Linear(config.hidden_size, config.hidden_size) for _ in range(config.decoder_layers)
                )
                for name in names
            }
        )

    def forward(self, final_state: torch.Tensor) -> torch.Tensor:
        """(B, N, encoder layers, D) -> (B, N, decoder layers, D)"""
        states = []
        layers: Any
        for (name, layers), final in zip(self.projections.items(), final_state.unbind(1), strict=True):
            projected = torch.stack(
                [layer(final[:, index if self.paired else -1]) for index, layer in enumerate(layers)], dim=1
            )
            states.append(projected.tanh() if name == "h" else projected)
        return torch.stack(states, dim=1)


class DragomanRnnPreTrainedModel(PreTrainedModel):
    """What all models of the family tell Transformers about themselves."""

    config: DragomanRnnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # torch's fused calls keep what they need for the backward pass; there are no layers to recompute.
    supports_gradient_checkpointing = False
    _no_split_modules = ["DragomanRnnEncoder", "DragomanRnnDecoder"]
    _skip_keys_device_placement = ["past_key_values"]
    # A state cannot be rolled back, so no assisted decoding.
    _is_stateful = True
    _supports_context_parallel = False

    def _init_weights(self, module: nn.Module):
        """
        Weights with a standard deviation of fan_in ** -0.5, or of `init_std`; the fan-in of an embedding is 1, since no
        norm follows it, and tied to the output layer it learns faster so. Biases of zero, but one for the forget gates
        of LSTMs (Jozefowicz 2015).
        """
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std or module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std or 1.0)
        elif isinstance(module, nn.RNNBase):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    init.normal_(parameter, std=std or parameter.shape[1] ** -0.5)
                elif isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                    forget = torch.zeros_like(parameter)
                    forget[module.hidden_size : 2 * module.hidden_size] = 1.0
                    init.copy_(parameter, forget)
                else:
                    init.zeros_(parameter)
        else:
            super()._init_weights(module)

    def refuse(self, **arguments):
        """For arguments of the common signature that mean nothing here."""
        for name, value in arguments.items():
            if value is not None:
                raise ValueError(
                    f"{type(self).__name__} cannot honor {name}: a recurrent network takes the tokens of a row in "
                    "their order, one pair a row; leave it out."
                )


def check_mask(name: str, mask: torch.Tensor | None):
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"{name} has {mask.ndim} dimensions, but a recurrent network reads rows of tokens: give a mask of "
            "(rows, length), true for real tokens."
        )


class DragomanRnnEncoder(DragomanRnnPreTrainedModel):
    """Source tokens -> source states, and the last state of every layer."""

    _fsdp_plan = {"rnn": "free_full_weight"}

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.source_vocab_size or config.vocab_size, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        width = config.hidden_size // 2 if config.bidirectional_encoder else config.hidden_size
        self.rnn = make_rnn(
            config, config.embedding_dim, width, config.encoder_layers, bidirectional=config.bidirectional_encoder
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> DragomanRnnEncoderOutput:
        """(B, S), and a mask (B, S) with padding anywhere -> `DragomanRnnEncoderOutput`"""
        self.refuse(position_ids=position_ids, segment_ids=segment_ids)
        check_mask("attention_mask", attention_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs either token ids or embeddings, and not both.")
        embeds = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        length = embeds.shape[1]
        real = embeds.new_ones(embeds.shape[:2]) if attention_mask is None else attention_mask
        order = reading_order(real.bool(), self.config.reverse_source)
        back = order.argsort(dim=1)
        in_order = take(embeds, order)
        # A row of padding alone is read as one token, since torch packs no empty rows.
        lengths = real.bool().sum(dim=1).clamp(min=1).cpu()

        def pack() -> PackedSequence:
            return pack_padded_sequence(in_order, lengths, batch_first=True, enforce_sorted=False)

        def in_place(outputs: PackedSequence) -> torch.Tensor:
            return take(pad_packed_sequence(outputs, batch_first=True, total_length=length)[0], back)

        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        layers = None
        if asked or self.config.attention == "context_as_state":
            packed_layers, state = run_layers(self.rnn, pack())
            layers = [in_place(outputs) for outputs in packed_layers]
            last = layers[-1]
        elif attention_mask is None or lengths.min() == length:  # unpacked is faster
            outputs, state = run(self.rnn, in_order, None)
            last = take(outputs, back)
        else:
            outputs, state = run(self.rnn, pack(), None)
            last = in_place(outputs)

        directions = 2 if self.config.bidirectional_encoder else 1
        final = torch.stack(state).unflatten(1, (-1, directions))  # (N, L, directions, B, D / directions)
        return DragomanRnnEncoderOutput(
            last_hidden_state=last,
            final_state=final.permute(3, 0, 1, 2, 4).flatten(3),
            layer_states=torch.stack(layers, dim=1)
            if layers is not None and self.config.attention == "context_as_state"
            else None,
            hidden_states=(embeds, *layers) if layers is not None and asked else None,
        )


class DragomanRnnDecoder(DragomanRnnPreTrainedModel):
    """Target tokens so far and the encoder's output -> target states, each for predicting the next token."""

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrence = make_recurrence(config)
        taken_over = (("h", "c") if config.cell == "lstm" else ("h",))[self.recurrence.first_state :]
        learned = config.bidirectional_encoder or config.encoder_layers != config.decoder_layers
        self.bridge = DragomanRnnBridge(config, taken_over) if learned and taken_over else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: DragomanRnnEncoderOutput | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: DragomanRecurrentCache | None = None,
        use_cache: bool | None = None,
        scheduled_sampling: ScheduledSampling | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(B * g, T) and the encoder's output for B sources -> `last_hidden_state` (B * g, T, D)"""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs either token ids or embeddings, and not both.")
        if not isinstance(encoder_outputs, DragomanRnnEncoderOutput) or encoder_outputs.final_state is None:
            raise ValueError("The decoder needs encoder_outputs as the encoder of this model gives them.")
        self.check_target_mask(attention_mask)
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = past_key_values
        if cache is None:
            cache = DragomanRecurrentCache()
        elif not isinstance(cache, DragomanRecurrentCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, but a recurrent decoder keeps its state in a "
                "DragomanRecurrentCache: leave it out, and generate() makes one."
            )

        embeds = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        rows, length, _ = embeds.shape
        source, state = self.look_at(encoder_outputs, encoder_attention_mask, cache, rows, length)
        if self.recurrence.one_call and scheduled_sampling is None and (length == 1 or not output_hidden_states):
            steps = [self.recurrence(embeds, state, source)]
        else:
            steps = self.unroll(embeds, state, source, scheduled_sampling)
        if use_cache:
            cache.advance(steps[-1].state, source.keys, length)

        states = self.dropout(torch.cat([step.outputs for step in steps], dim=1))
        hidden_states = cross_attentions = None
        if output_hidden_states:
            layers = torch.stack([step.layers for step in steps], dim=2)  # (L, B * g, T, D)
            hidden_states = (embeds, *layers[:-1], states)
        if output_attentions and steps[0].weights:
            weights = zip(*[step.weights for step in steps], strict=True)
            cross_attentions = tuple(torch.cat(layer, dim=1)[:, None] for layer in weights)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states,
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states,
            cross_attentions=cross_attentions,
        )

    def check_target_mask(self, mask: torch.Tensor | None):
        """Padding at the end of a target changes nothing before it; elsewhere it would be read like a token."""
        check_mask("decoder_attention_mask", mask)
        if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(
                "decoder_attention_mask hides positions before a real token, which a recurrent decoder has read by "
                "then: pad targets on the right."
            )

    def look_at(
        self,
        encoder_outputs: DragomanRnnEncoderOutput,
        attention_mask: torch.Tensor | None,
        cache: DragomanRecurrentCache,
        rows: int,
        length: int,
    ) -> tuple[Source, tuple[torch.Tensor, ...]]:
        """The source as the recurrence wants it, and the state before this call's first step."""
        values: Any = encoder_outputs.last_hidden_state
        sources, source_length, _ = values.shape
        if rows % sources:
            raise ValueError(f"{rows} target rows cannot share {sources} sources evenly.")
        g = rows // sources
        real = values.new_ones((sources, source_length)) if attention_mask is None else attention_mask
        real = real.bool()
        visible = real[:, None, None].expand(-1, g, length, -1)
        if self.config.attention_direction == "unidirectional":
            places = real.cumsum(dim=1) - 1  # counted over real tokens, so that padding on the left changes nothing
            steps = torch.arange(length, device=real.device) + cache.length
            visible = visible & (places[:, None, None] <= steps[:, None])

        final: Any = encoder_outputs.final_state
        if cache.length:
            state, keys = cache.states, cache.keys
        else:
            first = self.bridge(final[:, self.recurrence.first_state :]).repeat_interleave(g, dim=0)
            state = self.recurrence.start(tuple(first.permute(1, 2, 0, 3).contiguous().unbind(0)))
            keys = self.recurrence.keys(values)
        if encoder_outputs.layer_states is not None:
            values = encoder_outputs.layer_states
        summary = final[:, 0, -1].repeat_interleave(g, dim=0)
        return Source(values, keys, visible, real.sum(dim=1), summary), state

    def unroll(
        self,
        embeds: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        source: Source,
        scheduled_sampling: ScheduledSampling | None,
    ) -> list[Step]:
        """One step after the other, each fed the true token or the model's own."""
        steps: list[Step] = []
        for t in range(embeds.shape[1]):
            inputs = embeds[:, t : t + 1]
            if scheduled_sampling is not None and not scheduled_sampling.gold[:, t].all():
                own = scheduled_sampling.own_tokens(steps[-1].outputs, t)
                gold = scheduled_sampling.gold[:, t, None, None].to(inputs.device)
                inputs = torch.where(gold, inputs, self.dropout(self.embed_tokens(own)))
            step = self.recurrence(inputs, state, source._replace(visible=source.visible[:, :, t : t + 1]))
            steps.append(step)
            state = step.state
        return steps


class DragomanRnnModel(TokenTables, DragomanRnnPreTrainedModel):
    """Encoder and decoder without a head: token ids in, decoder states out."""

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config)
        # On the instance, because the two ties are independent of each other.
        self._tied_weights_keys = (
            {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"} if config.share_embeddings else {}
        )
        self.encoder = DragomanRnnEncoder(config)
        self.decoder = DragomanRnnDecoder(config)
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
        past_key_values: DragomanRecurrentCache | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        scheduled_sampling: ScheduledSampling | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids (B, S), or inputs_embeds (B, S, E), or encoder_outputs from an earlier call.
            attention_mask: true for real source tokens (B, S), with padding anywhere.
            decoder_input_ids (B, T), or decoder_inputs_embeds (B, T, E): the target, beginning with the start token.
            decoder_attention_mask: true for real target tokens (B, past + T), with padding at the end only.
            scheduled_sampling: where to replace the true tokens by the model's own, made by the model with a head.

        The common signature's cross_attention_mask, position_ids, decoder_position_ids, segment_ids and
        decoder_segment_ids are refused.

        Returns:
            `last_hidden_state` (B, T, D), `encoder_last_hidden_state` (B, S, D) and what was asked for:
            `cross_attentions` holds (B, 1, T, S) for the one attention, or one for each layer of `context_as_state`.

        Raises:
            ValueError: no target input; an argument that a recurrent network cannot honor.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "The decoder has no input: give labels, or decoder_input_ids, or decoder_inputs_embeds. "
                "(A collator made as DataCollatorForSeq2Seq(tokenizer, model=model) adds decoder_input_ids.)"
            )
        self.refuse(
            cross_attention_mask=cross_attention_mask,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
        )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = DragomanRnnEncoderOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            encoder_attention_mask=attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            scheduled_sampling=scheduled_sampling,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
        )


class DragomanRnnForConditionalGeneration(LanguageModelHead, DragomanRnnPreTrainedModel, DragomanGenerationMixin):
    """The model to train and to translate with: encoder, decoder and an output layer over the target vocabulary."""

    encoder_output_class = DragomanRnnEncoderOutput

    def __init__(self, config: DragomanRnnConfig):
        super().__init__(config)
        self._tied_weights_keys = self.head_tie()
        self.model = DragomanRnnModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
        # Without a length, stock generate() stops after 20 tokens. Training writes one that fits its data.
        if self.generation_config.max_length is None:
            self.generation_config.max_length = config.max_target_length

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} means nothing to a recurrent model: "
                "its cache has one size, so leave it out."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True  # as the host marks the caller's caches, which only its own loops continue
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = DragomanRecurrentCache()

    def target_arguments(self, decoder_inputs: torch.Tensor | None, kwargs: dict) -> dict:
        """
        Scheduled sampling, by two more arguments of `forward`:

            teacher_forcing_ratio: chance of feeding the true token; where it is not given, the configuration's in
                training mode and 1 in evaluation mode.
            teacher_forcing_generator: on the CPU, tosses the coins; where it is not given, torch's own does. One that a
                trainer seeds for each optimizer step makes that step's coins repeatable.
        """
        ratio, generator = kwargs.pop("teacher_forcing_ratio", None), kwargs.pop("teacher_forcing_generator", None)
        return {**kwargs, "scheduled_sampling": self.scheduled_sampling(decoder_inputs, ratio, generator)}

    def scheduled_sampling(
        self, target: torch.Tensor | None, ratio: float | None, generator: torch.Generator | None
    ) -> ScheduledSampling | None:
        """The coins for a target (B, T), or None where every token fed is the true one."""
        if ratio is None:
            ratio = self.config.teacher_forcing_ratio if self.training else 1.0
        if not 0 <= ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={ratio} must be between 0 and 1.")
        if target is None or ratio == 1:
            return None
        return ScheduledSampling.toss(
            target.shape[0],
            target.shape[1],
            ratio,
            self.config.teacher_forcing_coin,
            self.config.teacher_forcing_feedback,
            generator,
            self.lm_head,
        )
