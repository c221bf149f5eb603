"""What both families add to `generate()`: decoding modes, one copy of the source for all its beams, checks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import (
    GenerateEncoderDecoderOutput,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .decoding_loops import beam_search, choose, follows_own_loop, sample, unit
from .decoding_loops import contrastive_search as contrastive_search_for_tokens
from .decoding_steps import ForwardSteps, target_side
from .loss import shift_tokens_right
from .offline_search import ConstrainedBeamSearch, DiverseBeamSearch, check_beams, offline_beam_search


# Shapes: B sources, k candidates, t target tokens so far, D width of the decoder states, V target vocabulary.


def own_or_hosts(own_loop: Callable, hosts_loop: Callable) -> Callable:
    """A method in place of a loop of `GenerationMixin`: ours where it does the same, else the host's."""

    def loop(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        what = (self, input_ids, logits_processor, stopping_criteria, generation_config)
        if follows_own_loop(*what, model_kwargs, synced_gpus, streamer):
            return own_loop(*what, **model_kwargs)
        # Only the host's greedy search and sampling stream; beam search would take the argument for the model's.
        streaming = {} if streamer is None else {"streamer": streamer}
        return hosts_loop(*what, synced_gpus=synced_gpus, **streaming, **model_kwargs)

    return loop


class DragomanGenerationMixin(GenerationMixin):
    """Stock generation, plus the decoding modes that Transformers sent away, offline."""

    config: Any
    encoder_output_class: type[ModelOutput] = BaseModelOutput

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn=None,
        synced_gpus: bool | None = None,
        assistant_model=None,
        streamer=None,
        custom_generate=None,
        **kwargs,
    ):
        """
        Everything `GenerationMixin.generate` does, with the same arguments, and contrastive search (Su 2022) when
        `penalty_alpha` > 0 and `top_k` > 1, `top_k` being 4 unless the call gives it. `penalty_alpha` in the call
        also means one beam and no sampling, whatever the model's own generation config says about them.

        Diverse beam search (Vijayakumar 2016) when `num_beam_groups` > 1, with a `diversity_penalty` > 0; constrained
        beam search (Hokamp and Liu 2017, Post and Vilar 2018) when `force_words_ids` are given: `[[5, 6], [9]]` are two
        words that have to appear among the new tokens, `[[[5, 6], [7]], [9]]` leaves the first one a choice. They need
        room for all of them one after another, also where they could overlap.

        Raises:
            ValueError: ids outside the vocabulary; settings that exclude each other, such as `penalty_alpha` and beams;
                forced words for which there is no room; rows that cannot share the sources of `encoder_outputs` evenly.
        """
        kwargs.pop("labels", None)  # Seq2SeqTrainer passes the whole batch; they decide nothing here
        if isinstance(kwargs.get("encoder_outputs"), tuple | list):  # the host counts the sources by name
            kwargs["encoder_outputs"] = self.encoder_output_class(*kwargs["encoder_outputs"])
        self._check_ids("input_ids", inputs if inputs is not None else kwargs.get("input_ids"))
        self._check_ids("decoder_input_ids", kwargs.get("decoder_input_ids"))
        if kwargs.get("max_new_tokens") is not None and kwargs.keys().isdisjoint({"max_length", "decoder_input_ids"}):
            # The same length, but without a warning about the one that the model's generation config holds.
            kwargs.update(max_length=kwargs["max_new_tokens"] + 1, max_new_tokens=None)
        if custom_generate is None:
            custom_generate, kwargs = self._own_loop(generation_config, synced_gpus, assistant_model, streamer, kwargs)
            if custom_generate is not None:
                stopping_criteria = self._stop_strings_as_criterion(generation_config, stopping_criteria, kwargs)
        self._check_settings(self._prepare_generation_config(generation_config, **kwargs)[0])
        return super().generate(
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            streamer=streamer,
            custom_generate=custom_generate,
            **kwargs,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) -> decoder inputs (B, T). Called by `DataCollatorForSeq2Seq(model=...)` and by `forward`."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    def _check_ids(self, name: str, ids: torch.Tensor | None):
        vocab_size = self.config.vocab_size
        if name == "input_ids" and self.config.source_vocab_size is not None:
            vocab_size = self.config.source_vocab_size
        if ids is None or ids.is_floating_point():
            return
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                f"{name} have the shape {tuple(ids.shape)}: give rows of equal length with at least one token, "
                "(rows, length)."
            )
        lowest, highest = torch.aminmax(ids)
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"{name} hold {int(lowest if lowest < 0 else highest)}, but the vocabulary has {vocab_size} ids, from "
                f"0 to {vocab_size - 1}: the tokenizer does not belong to this model."
            )

    def _check_settings(self, config: GenerationConfig):
        """Refuses what would fail somewhere inside the host's loop, or do nothing."""
        if config.guidance_scale is not None and config.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={config.guidance_scale} needs a model that also runs without its source, which an "
                "encoder-decoder does not: leave it out."
            )
        if self.config.source_vocab_size is not None and not self.config.share_embeddings:
            for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
                if getattr(config, name) not in (None, 0, 1.0):
                    raise ValueError(
                        f"{name}={getattr(config, name)} compares source with target ids, but this model has a "
                        "vocabulary of its own for each side: leave it out."
                    )
        one_or_more = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
        for name in ("decoder_start_token_id", *one_or_more):
            value = getattr(config, name)
            for token in value if isinstance(value, list | tuple) else [value]:
                if token is not None and not 0 <= token < self.config.vocab_size:
                    raise ValueError(
                        f"{name}={value} holds {token}, but the target vocabulary has the ids 0 to "
                        f"{self.config.vocab_size - 1}."
                    )

    def _own_loop(
        self, generation_config: GenerationConfig | None, synced_gpus, assistant_model, streamer, kwargs: dict
    ):
        """The loop of `OFFLINE_LOOPS` that the arguments ask for, or None; and the arguments for the host."""

        def given(name: str):
            value = kwargs.get(name)
            return value if value is not None or generation_config is None else getattr(generation_config, name)

        alpha, top_k = given("penalty_alpha"), given("top_k")
        kwargs = {name: value for name, value in kwargs.items() if name != "penalty_alpha"}
        if alpha:
            if (given("num_beams") or 1) > 1 or given("do_sample"):
                raise ValueError(
                    f"penalty_alpha={alpha} asks for contrastive search, which has one beam and does not sample: "
                    "drop it, or drop num_beams and do_sample."
                )
            if given("force_words_ids") is not None:
                raise ValueError(
                    f"penalty_alpha={alpha} asks for contrastive search, force_words_ids for beams: drop one of them."
                )
            kwargs.update(num_beams=1, do_sample=False)
        elif alpha is None:
            alpha = self.generation_config.penalty_alpha
        # The host's own default for top_k, 50, is meant for sampling, and training may have written it into the
        # model's generation config. So only the call counts.
        top_k = 4 if top_k is None else top_k
        settings = {name: value for name, value in kwargs.items() if name != "top_k"}
        config = self._prepare_generation_config(generation_config, **settings)[0]
        mode = config.get_generation_mode(assistant_model)
        if mode in (GenerationMode.GROUP_BEAM_SEARCH, GenerationMode.CONSTRAINED_BEAM_SEARCH):
            check_beams(config, self.config.vocab_size, streamer, assistant_model)
        elif (given("num_beam_groups") or 1) > 1:
            raise ValueError(
                f"num_beam_groups={given('num_beam_groups')} does not divide num_beams={config.num_beams or 1}: all "
                "groups have as many beams."
            )
        elif given("diversity_penalty"):
            raise ValueError(
                f"diversity_penalty={given('diversity_penalty')} needs num_beam_groups of at least 2, among which the "
                "beams are divided."
            )
        if not alpha or top_k <= 1 or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.CONTRASTIVE_SEARCH):
            # What the model's own generation config says is over, or the host would look for its contrastive search.
            settings, own = (kwargs if alpha else {**kwargs, "penalty_alpha": 0.0}), {}
            mode = GenerationMode.GREEDY_SEARCH if mode == GenerationMode.CONTRASTIVE_SEARCH else mode
        else:
            if not 0 < alpha <= 1:
                raise ValueError(f"penalty_alpha={alpha} must be between 0 (greedy) and 1 (only the penalty counts).")
            mode, own = GenerationMode.CONTRASTIVE_SEARCH, {"penalty_alpha": alpha, "top_k": top_k}
        if mode not in OFFLINE_LOOPS:
            return None, settings
        # Transformers hands a callable neither the streamer nor synced_gpus, so they travel inside it.
        synced_gpus = self._extract_generation_mode_kwargs(None, {}, synced_gpus, None, None)["synced_gpus"]
        return functools.partial(OFFLINE_LOOPS[mode], streamer=streamer, synced_gpus=synced_gpus, **own), settings

    def _stop_strings_as_criterion(self, generation_config, stopping_criteria, kwargs: dict):
        """The host builds this criterion itself, but not beside a callable."""
        strings = kwargs.get("stop_strings")
        for config in (generation_config, self.generation_config):
            if strings is None and config is not None:
                strings = config.stop_strings
        if strings is None:
            return stopping_criteria
        kwargs["stop_strings"] = None
        if kwargs.get("tokenizer") is None:
            raise ValueError("stop_strings need the tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer).")
        criterion = StopStringCriteria(tokenizer=kwargs.pop("tokenizer"), stop_strings=strings)
        return StoppingCriteriaList([*(stopping_criteria or []), criterion])

    def decoding_steps(self, prompt: torch.Tensor, model_kwargs: dict[str, Any], g: int, **options) -> ForwardSteps:
        """How the loops of `decoding_loops` go through the target, as `ForwardSteps` describes it."""
        return ForwardSteps(self, prompt, model_kwargs, g, options.get("with_states", False))

    # What `generate` calls for greedy search and sampling, and for beam search with or without sampling.
    _sample = own_or_hosts(sample, GenerationMixin._sample)
    _beam_search = own_or_hosts(beam_search, GenerationMixin._beam_search)

    # The beams of a sentence read the same source, so its encoder states, mask and cross-attention keys exist once:
    # they are not expanded, not reordered, and cross-attention finds out from the shapes which rows share them.

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        of_source = model_kwargs.keys() & {"encoder_outputs", "attention_mask", "position_ids", "segment_ids"}
        shared = {name: model_kwargs.pop(name) for name in of_source}
        rows, sources = len(input_ids), len(shared["encoder_outputs"][0])
        if rows % sources:
            raise ValueError(f"{rows} target rows cannot share the {sources} sources of encoder_outputs evenly.")
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **shared}

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        target_side(past_key_values).reorder_cache(beam_idx)
        return past_key_values


@torch.no_grad()
def contrastive_search(
    model,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    penalty_alpha: float,
    top_k: int,
    streamer=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """
    Contrastive search (Su 2022, equation 5): of the `top_k` most probable tokens take the one with the highest

        (1 - penalty_alpha) * p(token) - penalty_alpha * max_j cos(state of token, state of earlier token j)

    The states are the decoder's last hidden states, the start token's among them, padding not. One forward pass per
    step tries all candidates and leaves the winner's logits and state behind for the next step.

    Args and result as for the loops of `GenerationMixin`; `scores` are the processed logits, as in greedy search. Where
    only tokens are wanted, `decoding_loops` does the same faster.
    """
    cache = model_kwargs.get("past_key_values")
    if cache is not None and isinstance(target_side(cache), StaticCache):
        raise ValueError("contrastive search needs a cache that can grow: leave out cache_implementation='static'.")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("contrastive search needs the states of the whole target prefix: pass no filled cache.")
    what = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    if follows_own_loop(*what, model_kwargs, synced_gpus, streamer):
        return contrastive_search_for_tokens(*what, penalty_alpha=penalty_alpha, top_k=top_k, **model_kwargs)

    use_cache = model_kwargs["use_cache"]
    pad: Any = generation_config._pad_token_tensor
    may_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    wanted: dict[str, Any] = {
        name: () if generation_config.return_dict_in_generate and flag else None
        for name, flag in (
            ("scores", generation_config.output_scores),
            ("logits", generation_config.output_logits),
            ("decoder_attentions", generation_config.output_attentions),
            ("cross_attentions", generation_config.output_attentions),
            ("decoder_hidden_states", generation_config.output_hidden_states),
        )
    }

    def forward(ids: torch.Tensor, arguments: dict, first: bool = False):
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1 if use_cache and not first else None, is_first_iteration=first, **arguments
        )
        return model(**{**inputs, "output_hidden_states": True, "return_dict": True})

    outputs = forward(input_ids, model_kwargs, first=True)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=True)
    states = unit(outputs.decoder_hidden_states[-1])  # (B, t, D)
    mask = model_kwargs.get("decoder_attention_mask")
    visible = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask is not None:
        visible = mask[:, : states.shape[1]].bool()

    batch_size = input_ids.shape[0]
    unfinished = torch.ones(batch_size, dtype=torch.long, device=input_ids.device)
    done = False
    while model._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
        logits = outputs.logits[:, -1].to(torch.promote_types(outputs.logits.dtype, torch.float32), copy=True)
        scores = logits_processor(input_ids, logits)
        step = {"scores": scores, "logits": logits, **{name: outputs.get(name) for name in tuple(wanted)[2:]}}
        wanted = {name: seen if seen is None else (*seen, step[name]) for name, seen in wanted.items()}

        probability, candidates = scores.softmax(dim=-1).topk(min(top_k, scores.shape[-1]))  # (B, k)
        k = candidates.shape[1]
        tried = torch.cat((input_ids.repeat_interleave(k, dim=0), candidates.reshape(-1, 1)), dim=-1)
        if use_cache:
            target_side(model_kwargs["past_key_values"]).batch_repeat_interleave(k)
        outputs = forward(tried, {name: _repeat_target(name, value, k) for name, value in model_kwargs.items()})
        tried_states = unit(outputs.decoder_hidden_states[-1][:, -1]).view(batch_size, k, -1)
        choice = choose(probability, tried_states, states, visible, penalty_alpha)
        winners = torch.arange(batch_size, device=choice.device) * k + choice
        if use_cache:
            target_side(model_kwargs["past_key_values"]).batch_select_indices(winners)
        outputs = _select_rows(outputs, winners)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=True)
        if synced_gpus and done:
            continue

        next_tokens = candidates.gather(1, choice[:, None]).squeeze(1)
        if may_end:
            next_tokens = next_tokens * unfinished + pad * (1 - unfinished)
        chosen_states = tried_states.gather(1, choice[:, None, None].expand(-1, -1, states.shape[-1]))
        states = torch.cat((states, chosen_states), dim=1)
        visible = torch.cat((visible, visible.new_ones(batch_size, 1)), dim=1)
        input_ids = torch.cat((input_ids, next_tokens[:, None]), dim=-1)
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, wanted["scores"])
        done = not unfinished.any()

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    encoder_outputs = model_kwargs["encoder_outputs"]
    return GenerateEncoderDecoderOutput(
        sequences=input_ids,
        encoder_attentions=encoder_outputs.get("attentions") if generation_config.output_attentions else None,
        encoder_hidden_states=encoder_outputs.get("hidden_states") if generation_config.output_hidden_states else None,
        past_key_values=model_kwargs.get("past_key_values"),
        **wanted,
    )


def _repeat_target(name: str, value, k: int):
    """What has a row per target gets k of them; what belongs to the source stays as it is."""
    return value.repeat_interleave(k, dim=0) if name.startswith("decoder_") and torch.is_tensor(value) else value


def _select_rows(outputs, rows: torch.Tensor):
    """The outputs of the chosen rows, as if only they had been computed."""
    for name in ("logits", "decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        value = outputs.get(name)
        if torch.is_tensor(value):
            outputs[name] = value[rows]
        elif value is not None:
            outputs[name] = tuple(layer if layer is None else layer[rows] for layer in value)
    return outputs


# The modes that `GenerationMixin` looks for on the Hub, and the loops that serve them here. A loop is called as
# loop(model, ids, logits_processor=, stopping_criteria=, generation_config=, streamer=, synced_gpus=, **model_kwargs),
# with ids (B * beams, t), and returns sequences or a dictionary as the host's loops do.
OFFLINE_LOOPS: dict[GenerationMode, Callable] = {
    GenerationMode.CONTRASTIVE_SEARCH: contrastive_search,
    GenerationMode.GROUP_BEAM_SEARCH: functools.partial(offline_beam_search, DiverseBeamSearch),
    GenerationMode.CONSTRAINED_BEAM_SEARCH: functools.partial(offline_beam_search, ConstrainedBeamSearch),
}
