"""Diverse and constrained beam search, which Transformers sent away: beams that avoid each other, and forced words."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import GenerateBeamEncoderDecoderOutput, LogitsProcessorList, StoppingCriteriaList

from .decoding_loops import Outbox, follows_own_loop, one_row_per_source, trimmed
from .decoding_steps import ForwardSteps


# Shapes: B sources, n beams per source, w of them in a group, C candidates for the next beams, t tokens so far, V
# target vocabulary, W forms of all forced words.


def offline_beam_search(
    search_class: Callable[..., "DiverseBeamSearch | ConstrainedBeamSearch"],
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """
    The loop of both searches. Where only tokens are wanted, finished sentences leave the batch.

    Args and result as for the loops of `GenerationMixin`; `input_ids` are (B * n, t).
    """
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("diverse and constrained beam search need the whole target prefix: pass no filled cache.")
    n, device = generation_config.num_beams, input_ids.device
    search = search_class(model, input_ids.view(-1, n, input_ids.shape[-1]), generation_config, stopping_criteria)
    beams = search.beams
    what = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    outbox = None
    if follows_own_loop(*what, model_kwargs, synced_gpus, streamer):
        outbox = Outbox(len(input_ids) // n, device)
        steps = model.decoding_steps(input_ids[::n], one_row_per_source(model_kwargs, n), n)
    else:
        steps = RowSteps(model, input_ids, model_kwargs, n)
    asked = generation_config.return_dict_in_generate
    all_scores: Any = () if asked and generation_config.output_scores else None
    all_logits: Any = () if asked and generation_config.output_logits else None
    returned = generation_config.num_return_sequences or 1

    ids: Any
    step, ids, done = steps.begin, input_ids, False
    while model._has_unfinished_sequences(done, synced_gpus, device=device):
        logits = step()
        if done:  # here, but not in another process
            continue
        logits = logits.repeat_interleave(len(ids) // len(logits), dim=0).to(torch.float32)
        log_probabilities = logits_processor(ids, logits.log_softmax(dim=-1))
        used = search.extend(log_probabilities.unflatten(0, (-1, n)))
        all_logits = all_logits if all_logits is None else (*all_logits, logits)
        all_scores = all_scores if all_scores is None else (*all_scores, used.flatten(0, 1))
        is_open = torch.stack([group.open for group in beams]).any(dim=0)
        done = not is_open.any()
        if outbox is not None:
            sequences, history, _ = best_of(beams, returned)
            staying = outbox.put(torch.cat((sequences, (history != -1).sum(dim=-1, keepdim=True)), dim=-1), ~is_open)
            if staying is not None:
                search.check_found(returned, ~is_open)
                if done:
                    return trimmed(outbox, input_ids.shape[1], beams[0].fill)
                search.keep(staying)
                steps.keep(staying)
        running = torch.cat([group.running for group in beams], dim=1)
        parents = torch.cat([group.parents + place * group.w for place, group in enumerate(beams)], dim=1)
        ids = running.flatten(0, 1)
        step = functools.partial(steps.next, running[:, :, -1], parents)

    search.check_found(returned, ~is_open)
    parts: Any = best_of(beams, returned)
    sequences, history, scores = (part.flatten(0, 1) for part in parts)
    longest = int((history != -1).sum(dim=1).max())
    sequences, history = sequences[:, : input_ids.shape[1] + longest], history[:, :longest]
    if not asked:
        return sequences
    return GenerateBeamEncoderDecoderOutput(
        sequences=sequences,
        sequences_scores=scores if generation_config.output_scores else None,
        scores=all_scores,
        logits=all_logits,
        beam_indices=history,
        past_key_values=steps.model_kwargs.get("past_key_values"),
    )


class DiverseBeamSearch:
    """
    Diverse beam search (Vijayakumar 2016, algorithm 1) with the Hamming diversity of its section 4: `num_beam_groups`
    groups of beams take a step one after another, and every beam of an earlier group that has just been continued with
    a token costs that token `diversity_penalty` in the log-probabilities of a later group. A beam that ends costs
    nothing. The scores hold these costs. The results of all groups are sorted together.
    """

    def __init__(
        self, model: Any, prompts: torch.Tensor, config: GenerationConfig, stopping_criteria: StoppingCriteriaList
    ):
        self.penalty, self.ends = config.diversity_penalty, config._eos_token_tensor
        n = prompts.shape[1]
        self.w = w = n // config.num_beam_groups
        self.beams = [Beams(prompts[:, :w], config, stopping_criteria, n, first) for first in range(0, n, w)]

    def extend(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Takes a step with processed log-probabilities (B, n, V) -> those that it used."""
        costs = torch.zeros_like(log_probabilities[:, 0])  # (B, V)
        used = []
        for group, of_group in zip(self.beams, log_probabilities.split(self.w, dim=1), strict=True):
            used.append(of_group - costs[:, None])
            scores, parents, tokens = best_continuations(used[-1] + group.scores[:, :, None], group.candidates)
            goes_on = scores.isfinite() & group.open[:, None]
            if self.ends is not None:
                goes_on &= ~torch.isin(tokens, self.ends)
            places = first(goes_on, self.w)
            costs.scatter_add_(1, tokens.gather(1, places), self.penalty * goes_on.gather(1, places).to(costs.dtype))
            group.extend(scores, parents, tokens, torch.arange(scores.shape[1], device=scores.device) < self.w)
        return torch.cat(used, dim=1)

    def keep(self, sources: torch.Tensor):
        """Goes on with these sources (B',) alone."""
        for group in self.beams:
            group.keep(sources)

    def check_found(self, returned: int, finished: torch.Tensor):
        """Whatever there is will do."""


class ConstrainedBeamSearch:
    """
    Beam search for the best outputs that hold every one of `force_words_ids`, each somewhere among the new tokens and
    in one piece; of a word with several forms (a list of lists) any one will do.

    As in Hokamp and Liu 2017, hypotheses compete with those that need as many more forced tokens, in banks; as in Post
    and Vilar 2018, there is one beam for all banks together, and banks take turns in filling it, those that need least
    first. Candidates are the best continuations, the best of each beam, and the tokens that a forced word wants next.
    A hypothesis that could not bring in the rest before `max_length` is dropped, and none may end before it has them.
    The rest is counted as words one after another; that words may overlap is not counted on.

    Raises:
        ValueError: the words, one after another, are longer than `max_length` allows, or another setting forbids one of
            their tokens.
    """

    def __init__(
        self, model: Any, prompts: torch.Tensor, config: GenerationConfig, stopping_criteria: StoppingCriteriaList
    ):
        self.max_length, self.ends = int(config.max_length), config._eos_token_tensor
        self.beams = [Beams(prompts, config, stopping_criteria, prompts.shape[1])]
        self.words = ForcedWords(config.force_words_ids, model.config.vocab_size, prompts.device)
        if self.words.total > self.max_length - prompts.shape[-1]:
            raise ValueError(
                f"force_words_ids have {self.words.total} tokens, but max_length={self.max_length} leaves room for "
                f"{self.max_length - prompts.shape[-1]} new ones: allow more, or force fewer."
            )
        self.states = self.words.begin(*prompts.shape[:2])

    def extend(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Takes a step with processed log-probabilities (B, n, V) -> those that it used."""
        words, states = self.words, self.states
        (beams,) = self.beams
        totals = log_probabilities + beams.scores[:, :, None]  # (B, n, V)
        if self.ends is not None:
            early = torch.zeros_like(totals, dtype=torch.bool).index_fill_(2, self.ends, True)
            totals = totals.masked_fill(early & (words.needed(states) > 0)[:, :, None], -torch.inf)
        best = totals.argmax(dim=-1, keepdim=True)  # (B, n, 1)
        wanted = torch.zeros_like(totals, dtype=torch.bool).scatter_(2, words.next_tokens(states, best), True)
        wanted = wanted.scatter_(2, best, True).flatten(1)
        wanted.scatter_(1, totals.flatten(1).topk(min(beams.candidates, wanted.shape[1])).indices, True)
        totals = totals.masked_fill(~wanted.view_as(totals), -torch.inf)
        scores, parents, tokens = best_continuations(totals, int(wanted.sum(dim=1).max()))
        after = words.advance(gather(states, parents), tokens)  # (B, C, W)
        needed = words.needed(after)
        scores = scores.masked_fill(needed > self.max_length - beams.running.shape[-1] - 1, -torch.inf)
        ranks = ranks_in_bank(needed, scores.isfinite(), words.total + 1)
        turns = (ranks * (words.total + 1) + needed).masked_fill(scores.isinf(), torch.iinfo(needed.dtype).max)
        order = turns.argsort(dim=1, stable=True)
        scores, parents, tokens = (part.gather(1, order) for part in (scores, parents, tokens))
        complete = (needed == 0) & (ranks < beams.w)
        kept = beams.extend(scores, parents, tokens, complete.gather(1, order))
        self.states = gather(after, order.gather(1, kept))
        return log_probabilities

    def keep(self, sources: torch.Tensor):
        """Goes on with these sources (B',) alone."""
        self.states = self.states[sources]
        self.beams[0].keep(sources)

    def check_found(self, returned: int, finished: torch.Tensor):
        """Refuses to give fewer outputs for one of the sources (B,) that are finished."""
        (beams,) = self.beams
        found = int(beams.ended_scores[finished].isfinite().sum(dim=1).min())
        if found < returned:
            raise ValueError(
                f"only {found} of num_return_sequences={returned} outputs of at most max_length={self.max_length} "
                "tokens hold all of force_words_ids: another setting forbids one of their tokens or stops too early, "
                "or leaves no room for more outputs."
            )


class Beams:
    """
    The running beams of each source, and the best of its hypotheses that have ended, scored and given up as in the
    host's beam search: sum of log-probabilities / new tokens ** length_penalty.

    Args:
        prompts: (B, w, P), the same for all beams of a source.
        criteria: what ends a hypothesis.
        rows: beams of a source in all, and `first`: the place of these among them.

    Attributes:
        running (B, w, t), scores (B, w): the beams; -inf where there is none.
        parents: (B, w), which beam each one continues.
        sequences (B, w, t), ended_scores (B, w): hypotheses that have ended, the best first; -inf where there is none.
        history, ended_history: (B, w, t - P), the rows of the batch that the tokens come from; -1 after the end.
        open: (B,), whether something may still change.
        candidates: continuations to look at, so that enough go on if some end.
    """

    def __init__(
        self, prompts: torch.Tensor, config: GenerationConfig, criteria: StoppingCriteriaList, rows: int, first: int = 0
    ):
        self.criteria, self.length_penalty = criteria, config.length_penalty
        self.early_stopping = config.early_stopping
        sources, self.w, self.prompt_length = prompts.shape
        self.longest: Any = config.max_length - self.prompt_length
        pad, eos = config._pad_token_tensor, config._eos_token_tensor
        self.fill = int((pad or eos[0]) if eos is not None else -1)  # as in the host, where a pad of 0 counts as none
        self.candidates = max(2, 1 + (0 if eos is None else len(eos))) * self.w
        device = prompts.device
        self.offsets = (torch.arange(sources, device=device) * rows + first)[:, None]
        self.running = self.sequences = prompts
        self.scores = torch.full((sources, self.w), -torch.inf, device=device)
        self.ended_scores = self.scores.clone()
        self.scores[:, 0] = 0.0  # at first all beams are the same
        self.parents = torch.arange(self.w, device=device).expand(sources, -1)
        self.history = self.ended_history = prompts[:, :, :0]
        self.open = torch.ones(sources, dtype=torch.bool, device=device)

    def extend(self, scores, parents, tokens, may_be_kept) -> torch.Tensor:
        """
        Takes the next beams from candidates (B, C), which stand in the order of preference: score, beam continued,
        token, and whether it may be kept if it ends here -> places (B, w) of the new beams among the candidates.
        """
        longer = torch.cat((gather(self.running, parents), tokens[:, :, None]), dim=-1)  # (B, C, t + 1)
        history = torch.cat((gather(self.history, parents), (self.offsets + parents)[:, :, None]), dim=-1)
        ends = self.criteria(longer.flatten(0, 1), None).view_as(tokens)

        new_tokens = longer.shape[-1] - self.prompt_length
        kept = ends & may_be_kept & self.open[:, None]
        final = (scores / new_tokens**self.length_penalty).masked_fill(~kept, -torch.inf)
        self.ended_scores, best = torch.cat((self.ended_scores, final), dim=1).topk(self.w)
        self.sequences = gather(
            torch.cat((nn.functional.pad(self.sequences, (0, 1), value=self.fill), longer), 1), best
        )
        ended = torch.cat((nn.functional.pad(self.ended_history, (0, 1), value=-1), history), dim=1)
        self.ended_history = gather(ended, best)

        goes_on = scores.isfinite() & ~ends
        places = first(goes_on, self.w)
        self.running, self.history = gather(longer, places), gather(history, places)
        self.parents = parents.gather(1, places)
        self.scores = scores.gather(1, places).masked_fill(~goes_on.gather(1, places), -torch.inf)

        full = self.ended_scores.isfinite().all(dim=1)
        length = self.longest if self.early_stopping == "never" and self.length_penalty > 0 else new_tokens
        hope = self.scores.amax(dim=1) / length**self.length_penalty
        self.open = self.open & (hope > self.ended_scores[:, -1].masked_fill(~full, -torch.inf))
        if self.early_stopping is True:
            self.open &= ~full
        return places

    def keep(self, sources: torch.Tensor):
        """Goes on with these sources (B',) alone."""
        self.running, self.scores, self.parents = self.running[sources], self.scores[sources], self.parents[sources]
        self.sequences, self.ended_scores = self.sequences[sources], self.ended_scores[sources]
        self.history, self.ended_history = self.history[sources], self.ended_history[sources]
        self.open, self.offsets = self.open[sources], self.offsets[sources]


class ForcedWords:
    """
    How far hypotheses have come with the words that they must hold: an automaton for each form of each word, whose
    state is the number of its tokens that the hypothesis ends with, or its length once it is there.

    Args:
        force_words_ids: a list of words, each a list of ids, or a list of such lists, its forms.

    Attributes:
        total: tokens of all words one after another, in their shortest forms.
    """

    def __init__(self, force_words_ids: Any, vocab_size: int, device: torch.device):
        words = [word if isinstance(word[0], list) else [word] for word in force_words_ids]
        forms = [form for word in words for form in word]
        self.lengths = torch.tensor([len(form) for form in forms], device=device)  # (W,)
        self.word_of = torch.tensor([number for number, word in enumerate(words) for _ in word], device=device)
        self.shortest = torch.tensor([min(map(len, word)) for word in words], device=device)
        self.total = int(self.shortest.sum())
        longest = int(self.lengths.max())
        self.tokens = torch.tensor([form + [0] * (longest - len(form)) for form in forms], device=device)
        known = sorted({token for form in forms for token in form})
        self.column = torch.zeros(vocab_size, dtype=torch.long, device=device)  # 0: of no word
        self.column[known] = torch.arange(1, len(known) + 1, device=device)
        table = torch.zeros(len(forms), longest + 1, len(known) + 1, dtype=torch.long)
        for number, form in enumerate(forms):
            for state in range(len(form)):
                for token in form:
                    seen = [*form[:state], token]
                    ends = (size for size in range(len(seen), 0, -1) if seen[-size:] == form[:size])
                    table[number, state, known.index(token) + 1] = next(ends, 0)
            table[number, len(form)] = len(form)
        self.table = table.to(device)

    def begin(self, sources: int, beams: int) -> torch.Tensor:
        return self.lengths.new_zeros(sources, beams, len(self.lengths))

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States (B, C, W) after one more token (B, C)"""
        forms = torch.arange(len(self.lengths), device=states.device)
        return self.table[forms, states, self.column[tokens][:, :, None]]

    def left(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, C, W) -> tokens (B, C, words) that each word needs if nothing breaks it off."""
        left = self.shortest.new_zeros(*states.shape[:2], len(self.shortest))
        word_of = self.word_of.expand_as(states)
        return left.scatter_reduce(2, word_of, self.lengths - states, "amin", include_self=False)

    def needed(self, states: torch.Tensor) -> torch.Tensor:
        """
        States (B, C, W) -> (B, C): as many tokens bring in the rest, one word after another, without overlaps. Only the
        word written first can profit from what is already there.
        """
        left = self.left(states)
        begun = ((self.shortest - left) * (left > 0)).amax(dim=2)
        return (self.shortest * (left > 0)).sum(dim=2) - begun

    def next_tokens(self, states: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """The token (B, C, W) that each form wants next, or what stands in (B, C, 1) if its word is there."""
        places = torch.minimum(states, self.lengths - 1)
        tokens = self.tokens[torch.arange(len(self.lengths), device=states.device), places]
        return torch.where(self.left(states)[:, :, self.word_of] > 0, tokens, otherwise)


class RowSteps(ForwardSteps):
    """Steps in which every beam has a row from the prompt on, as in the host's loops, for caches of any kind."""

    def __init__(self, model, input_ids: torch.Tensor, model_kwargs: dict[str, Any], g: int):
        super().__init__(model, input_ids, model_kwargs, g)
        self.rows_per_source = g

    def _select(self, rows: torch.Tensor, of_source: bool):
        cache = self.model_kwargs.get("past_key_values")
        if cache is not None:
            self.model_kwargs["past_key_values"] = self.model._reorder_cache(cache, rows)


def best_of(beams: list[Beams], count: int) -> tuple[Any, Any, torch.Tensor]:
    """The best hypotheses of all groups that have ended: sequences and history (B, count, t), scores (B, count)"""
    scores, best = torch.cat([group.ended_scores for group in beams], dim=1).sort(dim=1, descending=True, stable=True)
    best = best[:, :count]
    sequences = gather(torch.cat([group.sequences for group in beams], dim=1), best)
    history = gather(torch.cat([group.ended_history for group in beams], dim=1), best)
    return sequences, history, scores[:, :count]


def best_continuations(totals: torch.Tensor, count: int):
    """Totals (B, n, V) -> of the best ones (B, count): total, beam, token"""
    scores, places = totals.flatten(1).topk(min(count, totals[0].numel()))
    return scores, places // totals.shape[-1], places % totals.shape[-1]


def ranks_in_bank(banks: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """Banks (B, C), numbers below `size`, of candidates in their order -> how many of the same bank stand before."""
    members = nn.functional.one_hot(banks, size) * counts[:, :, None]  # (B, C, size)
    return (members.cumsum(dim=1) - members).gather(2, banks[:, :, None]).squeeze(2)


def first(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Places (B, count) of the first that are chosen (B, C), then of others."""
    return (~chosen).int().argsort(dim=1, stable=True)[:, :count]


def gather(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, n, ...), (B, C) -> (B, C, ...)"""
    return rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))


def check_beams(config: GenerationConfig, vocab_size: int, streamer: Any, assistant_model: Any):
    """Refuses settings with which neither search of this file can run."""
    forced = config.force_words_ids is not None or config.constraints is not None
    search = "constrained beam search (force_words_ids)"
    if not forced:
        search = f"diverse beam search (num_beam_groups={config.num_beam_groups})"
    if config.constraints is not None:
        raise ValueError(
            "constraints were objects of classes that Transformers no longer has: give force_words_ids, a list of "
            "words as lists of token ids."
        )
    if config.do_sample:
        raise ValueError(f"{search} does not sample: drop it, or give do_sample=False.")
    if streamer is not None:
        raise ValueError(f"{search} has no output before its end: leave out the streamer.")
    if assistant_model is not None or config.prompt_lookup_num_tokens is not None:
        raise ValueError(f"{search} takes no assistant: leave out one of the two.")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            f"{search} records neither attentions nor hidden states: leave out output_attentions and "
            "output_hidden_states."
        )
    if forced:
        _check_words(config, vocab_size)
    elif config.num_beams % config.num_beam_groups:
        raise ValueError(
            f"num_beam_groups={config.num_beam_groups} does not divide num_beams={config.num_beams}: all groups have "
            "as many beams."
        )
    elif not config.diversity_penalty or config.diversity_penalty < 0:
        raise ValueError(
            f"diversity_penalty={config.diversity_penalty} must be greater than 0 with num_beam_groups="
            f"{config.num_beam_groups}, or all groups would find the same."
        )


def _check_words(config: GenerationConfig, vocab_size: int):
    words = config.force_words_ids
    if (config.num_beam_groups or 1) > 1:
        raise ValueError(
            f"force_words_ids and num_beam_groups={config.num_beam_groups} exclude each other: constrained beam search "
            "has one group."
        )
    if (config.num_beams or 1) < 2:
        raise ValueError(f"force_words_ids need num_beams of at least 2, got {config.num_beams or 1}.")
    if not isinstance(words, list) or not words:
        raise ValueError(f"force_words_ids={words!r} must be a list of words, each a list of token ids.")
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for word in words:
        nested = isinstance(word, list) and bool(word) and all(isinstance(form, list) for form in word)
        for form in word if nested else [word]:
            if not (isinstance(form, list) and form and all(type(token) is int for token in form)):
                raise ValueError(
                    f"force_words_ids hold {word!r}: each word must be a list of token ids, or a list of such lists, "
                    "of which one has to appear."
                )
            foreign = [token for token in form if not 0 <= token < vocab_size]
            if foreign:
                raise ValueError(
                    f"force_words_ids hold {foreign[0]}, but the target vocabulary has the ids 0 to {vocab_size - 1}."
                )
            end = next((token for token in form if token in ends), None)
            if end is not None:
                raise ValueError(f"force_words_ids hold {form}, but {end} ends the output: leave it out.")
