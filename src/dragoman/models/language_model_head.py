"""From decoder states to logits and loss: the head that both families put on their encoder-decoder."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .embeddings import TokenTables
from .loss import next_token_loss, next_token_loss_of_states


# Shapes: B sources, S source length, T target length, D width of the decoder states, V target vocabulary.


class LanguageModelHead(TokenTables):
    """
    `forward`, ties and output layer of a model for conditional generation. The class that inherits it has a `model`
    (encoder and decoder) and an `lm_head`.
    """

    model: Any
    lm_head: Any
    training: bool
    prepare_decoder_input_ids_from_labels: Any

    def head_tie(self) -> dict[str, str]:
        """The tie of the output layer, for `_tied_weights_keys`: to the target's table where the config asks for it."""
        table = "encoder" if self.config.share_embeddings else "decoder"
        return {"lm_head.weight": f"model.{table}.embed_tokens.weight"} if self.config.tie_lm_head else {}

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def head_inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Decoder states (B, T, D) as the output layer takes them."""
        return states

    def target_arguments(self, decoder_inputs: torch.Tensor | None, kwargs: dict) -> dict:
        """`kwargs` with what only this family does to its decoder inputs, ids (B, T) or embeddings (B, T, D)."""
        return kwargs

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
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_logits: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        As the `forward` of the model without a head, and:

        Args:
            labels (B, T): the target without the start token, -100 where nothing is to be predicted. Where no decoder
                input is given, the labels shifted right become it.
            logits_to_keep: compute logits for the last so many positions only, or for these; 0 means all. Not with
                `labels`, whose loss takes all of them.
            num_items_in_batch: number of labels of the whole optimizer step, by which the summed loss is divided.
            output_logits: whether to return logits beside the loss. Where it is not given, they are left out only in
                training mode with `labels` and `num_items_in_batch`: as a Trainer calls when it optimizes. The loss
                then takes a fraction of the memory.

        Returns:
            `logits` (B, T, V) or None, `loss` if labels are given (label smoothing in training mode), and the rest.

        Raises:
            ValueError: `logits_to_keep` beside `labels`.
        """
        if labels is not None:
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("logits_to_keep leaves out logits that the loss of labels needs: give one of the two.")
            use_cache = False if use_cache is None else use_cache
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoder_inputs = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cross_attention_mask=cross_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            use_cache=use_cache,
            **self.target_arguments(decoder_inputs, kwargs),
        )
        states = outputs.last_hidden_state
        loss = logits = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(self.head_inputs(states[:, kept]))
        else:
            if output_logits is None:
                output_logits = not self.training or num_items_in_batch is None
            smoothing = self.config.label_smoothing if self.training else 0.0
            if output_logits:
                logits = self.lm_head(self.head_inputs(states))
                loss = next_token_loss(logits, labels, smoothing, num_items_in_batch)
            else:
                loss = next_token_loss_of_states(
                    self.head_inputs(states),
                    self.lm_head,
                    labels,
                    self.config.vocab_size,
                    smoothing,
                    num_items_in_batch,
                )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
