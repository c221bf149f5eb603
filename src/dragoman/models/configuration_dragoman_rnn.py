"""Configuration of the recurrent family."""

from typing import Literal

from transformers import PreTrainedConfig

from .strict_config import check_numbers, check_vocabularies, strict_config


@strict_config
class DragomanRnnConfig(PreTrainedConfig):
    r"""
    Configuration of [`DragomanRnnForConditionalGeneration`]: the recurrent encoder-decoders of 2014 and 2015.

    The defaults are the strongest of them that still trains in one fused call: a bidirectional LSTM encoder and an LSTM
    decoder with attention on top. The historical systems are presets that set every option their paper settles.

    Sizes:
        vocab_size: target vocabulary; also the source's unless `source_vocab_size` says otherwise.
        source_vocab_size: source vocabulary; `None` means the same as `vocab_size`.
        embedding_dim: width of the embeddings of both sides.
        hidden_size: width of the states of both sides; each direction of a bidirectional encoder has half of it.
        encoder_layers, decoder_layers: number of stacked recurrent layers.
        max_target_length: where a fresh model's `generate()` gives up; no limit of the network.

    Blocks:
        cell: `lstm` (Hochreiter and Schmidhuber 1997), `gru` (Cho 2014) or `rnn` (plain tanh, Elman 1990).
        bidirectional_encoder: read the source from both ends (Schuster and Paliwal 1997). The decoder then starts from
            a learned projection of the encoder's last states, and so it does where the numbers of layers differ.
        reverse_source: read the source from its end to its beginning (Sutskever 2014, section 3.3).
        attention: how the decoder reads the encoder's states. `none`; `additive` (Bahdanau 2015, A.1.2); `dot` and
            `general` (Luong 2015, equation 8); `scaled_dot`, `dot` divided by the square root of `hidden_size`;
            `context_as_state`: in every layer the attention over the same layer's encoder states, with the current
            input as query, replaces the hidden state before each step, and an LSTM's cell state is kept.
        attention_direction: `unidirectional` lets target step t see only source positions <= t; the default sees all.
        context_every_step: the context enters the input of every step. Without attention it is the encoder's last state
            (Cho 2014, section 2.2); with it, attention comes before the step and its query is the previous state
            (Bahdanau 2015, section 3.1) instead of after it with the new state as query (Luong 2015, section 3.1).
        input_feeding: what attention after the step made of the state enters the next input (Luong 2015, section 3.3).
        context_scaling: what divides the scores of `context_as_state`: the square root of the `source_length`, counted
            in real tokens, or of the `hidden_size`.
        teacher_forcing_ratio: in training, the chance that the decoder is fed the true token rather than its own
            (scheduled sampling, Bengio 2015); 1 is pure teacher forcing. `forward` takes another value for one call.
        teacher_forcing_coin: toss for every `token`, or for every `step` of the whole batch at once.
        teacher_forcing_feedback: its own token is the most probable one (`argmax`), or drawn (`sample`).
        dropout: on embeddings, between layers and on the output, never from step to step (Zaremba 2014).
        init_std: standard deviation of the initial weights; `None` means `fan_in ** -0.5`, which is 1 for
            embeddings.

    Ends:
        share_embeddings: one table for source and target (needs equal vocabularies).
        tie_lm_head: the output layer is the target's embedding table (needs `embedding_dim == hidden_size`).
        tie_word_embeddings: Transformers' own master switch; `False` undoes both ties above.
        lm_head_bias: a bias on the logits.
        label_smoothing: part of the target distribution spread over the vocabulary (Szegedy 2016), training only.

    Raises:
        ValueError: a value, or two values together, make no model; the message names both and what is allowed.
    """

    model_type = "dragoman_rnn"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "decoder_layers"}
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight"}

    vocab_size: int = 32000
    source_vocab_size: int | None = None
    embedding_dim: int = 512
    hidden_size: int = 512
    encoder_layers: int = 2
    decoder_layers: int = 2
    max_target_length: int = 512

    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    bidirectional_encoder: bool = True
    reverse_source: bool = False
    attention: Literal["none", "additive", "dot", "general", "scaled_dot", "context_as_state"] = "general"
    attention_direction: Literal["bidirectional", "unidirectional"] = "bidirectional"
    context_every_step: bool = False
    input_feeding: bool = False
    context_scaling: Literal["source_length", "hidden_size"] = "source_length"
    teacher_forcing_ratio: float | int = 1.0
    teacher_forcing_coin: Literal["token", "step"] = "token"
    teacher_forcing_feedback: Literal["argmax", "sample"] = "argmax"
    dropout: float | int = 0.1
    init_std: float | None = None

    share_embeddings: bool = True
    tie_lm_head: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    label_smoothing: float | int = 0.0

    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0
    use_cache: bool = True
    is_encoder_decoder: bool = True

    def validate_architecture(self):
        """Refuses what cannot be built or contradicts itself. Called at construction and at saving."""
        sizes = ("vocab_size", "embedding_dim", "hidden_size", "encoder_layers", "decoder_layers")
        check_numbers(self, sizes, ("dropout", "label_smoothing"))
        if self.max_target_length < 2:
            raise ValueError(f"max_target_length={self.max_target_length} must be at least 2, a start and a token.")
        if not 0 <= self.teacher_forcing_ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={self.teacher_forcing_ratio} must be between 0 and 1.")
        self._validate_ends()
        self._validate_reading()
        self._validate_attention()

    def _validate_ends(self):
        check_vocabularies(self)
        if self.tie_lm_head and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"tie_lm_head=True needs embeddings as wide as the states, but embedding_dim={self.embedding_dim} and "
                f"hidden_size={self.hidden_size}: set tie_lm_head=False, or make them equal."
            )

    def _validate_reading(self):
        if self.bidirectional_encoder and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is odd, but bidirectional_encoder=True gives half of it to each "
                "direction: choose an even hidden_size, or bidirectional_encoder=False."
            )
        if self.bidirectional_encoder and self.reverse_source:
            raise ValueError(
                "reverse_source=True has no meaning with bidirectional_encoder=True, which reads both ways: "
                "set one of them to False."
            )
        if self.reverse_source and self.attention_direction == "unidirectional":
            raise ValueError(
                "attention_direction='unidirectional' lets step t see source positions <= t, but with "
                "reverse_source=True the states there have read everything after them: set reverse_source=False, or "
                "attention_direction='bidirectional'."
            )

    def _validate_attention(self):
        if self.attention == "none":
            if self.attention_direction == "unidirectional":
                raise ValueError(
                    "attention_direction='unidirectional' needs an attention, but attention='none': choose one of "
                    "additive, dot, general, scaled_dot, context_as_state, or attention_direction='bidirectional'."
                )
            if self.input_feeding:
                raise ValueError(
                    "input_feeding=True feeds back what attention made of the state, but attention='none': choose one "
                    "of additive, dot, general, scaled_dot, or input_feeding=False."
                )
        if self.attention == "context_as_state":
            if self.encoder_layers != self.decoder_layers:
                raise ValueError(
                    f"attention='context_as_state' pairs the layers of both sides, but encoder_layers="
                    f"{self.encoder_layers} and decoder_layers={self.decoder_layers}: make them equal."
                )
            for name in ("context_every_step", "input_feeding"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}=True contradicts attention='context_as_state', where the context takes the place of "
                        f"the hidden state: set {name}=False, or choose one of additive, dot, general, scaled_dot."
                    )
        elif self.context_scaling != "source_length":
            raise ValueError(
                f"context_scaling={self.context_scaling!r} belongs to attention='context_as_state', not to "
                f"attention={self.attention!r}: leave it at 'source_length'."
            )
        if self.input_feeding and self.context_every_step:
            raise ValueError(
                "input_feeding=True needs attention after the step, context_every_step=True puts it before: "
                "set one of them to False."
            )
