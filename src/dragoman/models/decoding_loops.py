"""
Greedy search, sampling, beam search and contrastive search whose finished sentences leave the batch.

The tokens are those of the host's loops, which `follows_own_loop` keeps for everything that asks for more than tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, logits_process, stopping_criteria
from transformers.utils import ModelOutput

from .decoding_steps import rows_of
from .pipeline_dragoman import ForcedFirstTokens


# Names of Transformers 5.23 that are not public, on which these loops and `generation.py` lean:
# GenerationMixin._sample and ._beam_search, which they stand in for, with generation_config._pad_token_tensor and
# ._eos_token_tensor; ._get_top_k_continuations, ._get_running_beams_for_next_iteration, ._update_finished_beams and
# ._check_early_stop_heuristic, the steps of a beam search; ._expand_inputs_for_generation, ._reorder_cache,
# ._prepare_text_encoder_decoder_kwargs_for_generation, ._prepare_generation_config and
# ._extract_generation_mode_kwargs, which are overridden or asked; ._update_model_kwargs_for_generation and
# ._has_unfinished_sequences; the mark _is_user_defined on a cache.

# Shapes: B sources still in the batch, g rows (beams, samples) per source, k candidates, t tokens so far, V vocabulary.

# What looks at each row by itself, so that it does not matter which others are there.
ROW_BY_ROW = {
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.TopPLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.EosTokenCriteria,
    stopping_criteria.StopStringCriteria,
    ForcedFirstTokens,  # at the first token, before which no row leaves
}
# The arguments of `forward` of which the loops know whether they have a row per source or one per target.
KNOWN_ARGUMENTS = {
    "encoder_outputs",
    "attention_mask",
    "position_ids",
    "decoder_attention_mask",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def follows_own_loop(
    model: Any,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
    streamer: Any,
) -> bool:
    """
    The rule: the host's loop runs when more than tokens is wanted (a dictionary with scores, states or the cache; a
    streamer), when processes wait for each other, when the cache is the caller's or of fixed size, or when something
    unknown looks at the batch: a processor or criterion outside `ROW_BY_ROW`, an argument outside `KNOWN_ARGUMENTS`.
    """
    cache, encoder_outputs = model_kwargs.get("past_key_values"), model_kwargs.get("encoder_outputs")
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else ()
    types = {type(criterion) for criterion in criteria}
    return (
        not config.return_dict_in_generate
        and streamer is None
        and not synced_gpus
        and not config.is_assistant
        and config.prefill_chunk_size is None
        and {type(processor) for processor in processors} | types <= ROW_BY_ROW
        # The host's repetition penalty may hold a number for each row of the batch.
        and not any(torch.is_tensor(vars(processor).get("prompt_ignore_length")) for processor in processors)
        # Without an end token the host goes on writing into rows that a string has stopped.
        and (stopping_criteria.EosTokenCriteria in types or stopping_criteria.StopStringCriteria not in types)
        and {name for name, value in model_kwargs.items() if value is not None} <= KNOWN_ARGUMENTS
        and (cache is None or not vars(cache).get("_is_user_defined"))
        and all(type(part) is DynamicCache and not part.offloading for part in parts)
        and isinstance(encoder_outputs, ModelOutput)
        and len(encoder_outputs[0]) * max(config.num_beams, config.num_return_sequences) == len(input_ids)
        # Prompt tuning and the like put methods of their own in the way of the loop.
        and not {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"} & vars(model).keys()
    )


def one_row_per_source(model_kwargs: dict[str, Any], g: int) -> dict[str, Any]:
    """The arguments of `forward` before a source's g rows become different."""
    return {
        name: value[::g] if torch.is_tensor(value) and name.startswith("decoder_") else value
        for name, value in model_kwargs.items()
    }


class Outbox:
    """Where the rows of finished sources wait for the others, in the order of the sources."""

    def __init__(self, sources: int, device: torch.device):
        self.live = torch.arange(sources, device=device)  # (B,), the numbers of the sources that are still running
        self.rows: list[Any] = [None] * sources

    def put(self, rows: torch.Tensor, finished: torch.Tensor) -> torch.Tensor | None:
        """
        Rows (B, n, t) of the sources, of which some (B,) are finished -> positions (B',) of those that go on, none at
        the end. None where nobody leaves: that copies what stays, so it waits until an eighth of the batch is finished.
        """
        if 8 * int(finished.sum()) < len(finished):
            return None
        for number, row in zip(self.live[finished].tolist(), rows[finished], strict=True):
            self.rows[number] = row
        staying = (~finished).nonzero().squeeze(1)
        self.live = self.live[staying]
        return staying

    def sequences(self, fill: int) -> torch.Tensor:
        """All rows, one under another, (all sources * n, longest t)"""
        longest = max(row.shape[-1] for row in self.rows)
        padded = [nn.functional.pad(row, (0, longest - row.shape[-1]), value=fill) for row in self.rows]
        return torch.cat(padded)


class GrowingRows:
    """The rows of greedy search, sampling and contrastive search, which are one token longer after every step."""

    def __init__(self, ids: Any, g: int, criteria: StoppingCriteriaList, config: GenerationConfig):
        self.ids, self.g, self.criteria = ids, g, criteria  # (B * g, t)
        pad: Any = config._pad_token_tensor
        self.fill = 0 if pad is None else int(pad)
        self.pads = any(isinstance(criterion, stopping_criteria.EosTokenCriteria) for criterion in criteria)
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.outbox = Outbox(len(ids) // g, ids.device)

    def append(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Tokens (B * g,) -> positions (B',) of the sources that go on if some leave, else None."""
        if self.pads:
            tokens = tokens.where(self.unfinished, self.fill)
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=-1)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, None)
        staying = self.outbox.put(self.ids.unflatten(0, (-1, self.g)), ~self.unfinished.view(-1, self.g).any(dim=1))
        if staying is not None:
            rows = rows_of(staying, self.g)
            self.ids, self.unfinished = self.ids[rows], self.unfinished[rows]
        return staying

    def sequences(self) -> torch.Tensor:
        return self.outbox.sequences(self.fill)


def sample(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.Tensor:
    """`GenerationMixin._sample`: greedy search, or sampling, which draws as the host does until a source leaves."""
    g = generation_config.num_return_sequences
    rows = GrowingRows(input_ids, g, criteria, generation_config)
    steps = model.decoding_steps(input_ids[::g], one_row_per_source(model_kwargs, g), g, tree=False)
    logits = steps.begin().repeat_interleave(g, dim=0)
    while True:
        scores = logits_processor(rows.ids, logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        staying = rows.append(tokens)
        if staying is not None:
            if not len(staying):
                return rows.sequences()
            steps.keep(staying)
        tokens = rows.ids[:, -1].view(-1, g)
        logits = steps.next(tokens, torch.arange(g, device=tokens.device).expand_as(tokens))


def beam_search(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.Tensor:
    """
    `GenerationMixin._beam_search`, with or without sampling. What happens within a step is the host's own; a source
    leaves when the host would stop if it were alone, since nothing of its result changes after that.
    """
    host = GenerationMixin
    pad, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    g, returned = generation_config.num_beams, generation_config.num_return_sequences
    early_stopping, length_penalty = generation_config.early_stopping, generation_config.length_penalty
    prompt_length = length = input_ids.shape[1]
    device, sources = input_ids.device, len(input_ids) // g
    candidates = max(2, 1 + (0 if eos is None else len(eos))) * g
    fill = int((pad or eos[0]) if eos is not None else -1)  # as in the host, where a pad of 0 counts as none
    first = torch.arange(candidates, device=device) < g
    steps = model.decoding_steps(input_ids[::g], one_row_per_source(model_kwargs, g), g)
    logits = steps.begin().repeat_interleave(g, dim=0)
    outbox = Outbox(sources, device)

    running: Any
    running = sequences = input_ids.view(sources, g, -1)  # (B, g, t)
    running_scores = torch.zeros(sources, g, device=device)
    running_scores[:, 1:] = -1e9  # at first all beams are the same
    running_beams = beams = torch.empty(sources, g, 0, dtype=torch.int32, device=device)
    scores = torch.full((sources, g), -1e9, device=device)
    ended = torch.zeros(sources, g, dtype=torch.bool, device=device)
    improvable = torch.ones(sources, 1, dtype=torch.bool, device=device)
    while True:
        log_probabilities = logits.to(torch.float32, copy=True).log_softmax(dim=-1)
        log_probabilities = logits_processor(running.flatten(0, 1), log_probabilities)
        totals = (log_probabilities.unflatten(0, (-1, g)) + running_scores[:, :, None]).flatten(1)
        running, sequences = (nn.functional.pad(rows, (0, 1), value=fill) for rows in (running, sequences))
        running_beams, beams = (nn.functional.pad(rows, (0, 1), value=-1) for rows in (running_beams, beams))
        top_scores, top, top_beams = host._get_top_k_continuations(
            model,
            accumulated_log_probs=totals,
            running_sequences=running,
            running_beam_indices=running_beams,
            cur_len=length,
            decoder_prompt_len=prompt_length,
            do_sample=generation_config.do_sample,
            beams_to_keep=candidates,
            num_beams=g,
            batch_size=len(totals),
        )
        hits = criteria(top.flatten(0, 1), None).view(len(totals), candidates)
        running, running_scores, running_beams = host._get_running_beams_for_next_iteration(
            model, top_scores, top, top_beams, hits, g
        )
        sequences, scores, beams, ended = host._update_finished_beams(
            model,
            sequences=sequences,
            topk_running_sequences=top,
            beam_scores=scores,
            topk_log_probs=top_scores,
            beam_indices=beams,
            topk_running_beam_indices=top_beams,
            is_early_stop_heuristic_unsatisfied=improvable,
            is_sent_finished=ended,
            next_token_hits_stopping_criteria=hits,
            top_num_beam_mask=first,
            num_beams=g,
            cur_len=length,
            decoder_prompt_len=prompt_length,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        parents = running_beams[:, :, -1].long() % g
        length += 1
        improvable = host._check_early_stop_heuristic(
            improvable,
            running_scores,
            scores,
            ended,
            length,
            generation_config.max_length,
            prompt_length,
            early_stopping,
            length_penalty,
        )
        finished = ~improvable[:, 0] | (ended.all(dim=1) & (early_stopping is True)) | hits.all()
        # A row ends where its beams do, which may be before the width of the batch.
        rows = torch.cat((sequences, (beams != -1).sum(dim=-1, keepdim=True)), dim=-1)[:, :returned]
        staying = outbox.put(rows, finished)
        if staying is not None:
            if not len(staying):
                return trimmed(outbox, prompt_length, fill)
            steps.keep(staying)
            running, running_scores, running_beams = running[staying], running_scores[staying], running_beams[staying]
            sequences, scores, beams, ended = sequences[staying], scores[staying], beams[staying], ended[staying]
            improvable, parents = improvable[staying], parents[staying]
        logits = steps.next(running[:, :, -1], parents)


def trimmed(outbox: Outbox, prompt_length: int, fill: int) -> torch.Tensor:
    """The rows without their last column, which holds the number of tokens generated; as wide as the longest."""
    longest = prompt_length + int(max(rows[:, -1].max() for rows in outbox.rows))
    outbox.rows = [rows[:, :-1][:, :longest] for rows in outbox.rows]
    return outbox.sequences(fill)


def contrastive_search(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    penalty_alpha: float,
    top_k: int,
    **model_kwargs,
) -> torch.Tensor:
    """Contrastive search, as `generation.contrastive_search` defines it; the candidates of a source share its past."""
    k = min(top_k, model.config.vocab_size)
    rows = GrowingRows(input_ids, 1, criteria, generation_config)
    steps = model.decoding_steps(input_ids, model_kwargs, k, with_states=True)
    logits = steps.begin()
    states = unit(steps.states)  # (B, t, D)
    mask = model_kwargs.get("decoder_attention_mask")
    visible = states.new_ones(states.shape[:2]).bool() if mask is None else mask[:, : states.shape[1]].bool()
    choice = torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device)  # of the step before
    while True:
        scores = logits_processor(rows.ids, logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True))
        probability, candidates = scores.softmax(dim=-1).topk(k)  # (B, k)
        tried = steps.next(candidates, choice.expand(-1, k)).unflatten(0, (-1, k))  # (B, k, V)
        tried_states = unit(steps.states).unflatten(0, (-1, k)).squeeze(2)
        choice = choose(probability, tried_states, states, visible, penalty_alpha)[:, None]  # (B, 1)
        logits = tried.gather(1, choice[:, :, None].expand(-1, -1, tried.shape[-1])).squeeze(1)
        chosen_states = tried_states.gather(1, choice[:, :, None].expand(-1, -1, states.shape[-1]))
        states = torch.cat((states, chosen_states), dim=1)
        visible = nn.functional.pad(visible, (0, 1), value=True)
        staying = rows.append(candidates.gather(1, choice).squeeze(1))
        if staying is not None:
            if not len(staying):
                return rows.sequences()
            steps.keep(staying)
            logits, states, visible, choice = logits[staying], states[staying], visible[staying], choice[staying]


def choose(
    probability: torch.Tensor,
    tried_states: torch.Tensor,
    states: torch.Tensor,
    visible: torch.Tensor,
    penalty_alpha: float,
) -> torch.Tensor:
    """
    Number (B,) of the best candidate: probabilities (B, k), states of length 1 of the candidates (B, k, D) and of what
    came before (B, t, D), of which some are padding (B, t).
    """
    similarity = tried_states @ states.transpose(1, 2)  # (B, k, t)
    penalty = similarity.masked_fill(~visible[:, None], -1).amax(dim=-1)
    # A forbidden token (probability 0) must not win because it is unlike everything before it.
    value = ((1 - penalty_alpha) * probability - penalty_alpha * penalty).masked_fill(probability == 0, -torch.inf)
    return value.argmax(dim=-1)


def unit(states: torch.Tensor) -> torch.Tensor:
    """States of length 1, in full precision, so that their products are cosines."""
    return nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
