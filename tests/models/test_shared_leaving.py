"""Finished sentences leave the batch: the same tokens as from the host's loops, which run where they must."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import BOS, EOS, FAMILIES, PAD, B, Family, V, family, make_batch
from dragoman.models import decoding_steps, generation, modeling_dragoman, offline_search
from dragoman.models.pipeline_dragoman import ForcedFirstTokens


MODELS: dict[str, torch.nn.Module] = {}


def build(family: Family):
    """Models whose sentences end after very different numbers of tokens."""
    if family.name not in MODELS:
        model = family.build(seed=3, tie_lm_head=False)
        model.generation_config.eos_token_id = [EOS, 5, 9, 14, 20, 22]
        model.lm_head.weight.data *= 2
        for layer in model.model.decoder.layers if family.is_transformer else ():
            layer.cross_attn.o_proj.weight.data *= 4
            layer.self_attn.o_proj.weight.data *= 2
        MODELS[family.name] = model
    return MODELS[family.name]


def source(seed: int = 1, rows: int = B) -> dict[str, torch.Tensor]:
    batch = make_batch(seed, rows)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def by_the_host(monkeypatch_context, model, **arguments):
    with monkeypatch_context() as patch:
        patch.setattr(generation, "follows_own_loop", lambda *_: False)
        return model.generate(**arguments)


def settings_of(draw) -> dict:
    """Arguments of `generate` that the loops serve by themselves, in random company."""
    settings = {"max_new_tokens": draw(st.integers(1, 14))}
    some = {
        "min_new_tokens": st.integers(1, 5),
        "forced_bos_token_id": st.just(7),
        "forced_eos_token_id": st.just(EOS),
        "no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.just([[5], [6, 9]]),
        "repetition_penalty": st.just(1.7),
        "suppress_tokens": st.just([8, 9]),
        "exponential_decay_length_penalty": st.just([2, 1.3]),
        "eos_token_id": st.sampled_from([EOS, 13, [EOS, 11]]),
        "sequence_bias": st.just([[[4, 5], -2.0]]),
    }
    for name, values in some.items():
        if draw(st.integers(0, 3)) == 0:
            settings[name] = draw(values)
    mode = draw(st.sampled_from(["greedy", "beam", "beam", "contrastive"]))
    if mode == "beam":
        beams = draw(st.integers(2, 5))
        settings |= {
            "num_beams": beams,
            "num_return_sequences": draw(st.integers(1, beams)),
            "length_penalty": draw(st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])),
            "early_stopping": draw(st.sampled_from([True, False, "never"])),
        }
    elif mode == "contrastive":
        settings |= {"penalty_alpha": draw(st.sampled_from([0.2, 0.6])), "top_k": draw(st.integers(2, 6))}
    if draw(st.booleans()):
        settings["use_cache"] = draw(st.booleans())
    return settings


@given(data=st.data())
def test_tokens_are_the_hosts(data):
    """Two arbitrary decodings of an arbitrary family, with a prompt of one or more tokens, padded or not."""
    model = build(data.draw(st.sampled_from(FAMILIES)))
    arguments = source(data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 2, 3, 7, 18])))
    arguments |= settings_of(data.draw)
    rows = len(arguments["input_ids"])
    if data.draw(st.booleans()):
        arguments["decoder_input_ids"] = torch.tensor([[BOS, 5, 7], [BOS, 7, 4]] * 9)[:rows]
        transformer = isinstance(model, modeling_dragoman.DragomanForConditionalGeneration)
        if transformer and data.draw(st.booleans()):
            mask = torch.ones(rows, 3, dtype=torch.long)
            mask[::2, 0] = 0
            arguments["decoder_attention_mask"] = mask
    ours = model.generate(**arguments)
    stock = by_the_host(pytest.MonkeyPatch.context, model, **arguments)
    assert torch.equal(ours, stock), (arguments, ours, stock)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("name", ["modern", "bahdanau"])
def test_beams_stop_when_the_hosts_do(name, early_stopping):
    """
    Every rule of stopping under penalties that favor short and long outputs, with all beams returned; stopping early
    gives other outputs than going on.
    """
    model = build(next(family for family in FAMILIES if family.name == name))
    arguments = {**source(seed=5, rows=9), "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14}
    arguments |= {"early_stopping": early_stopping, "suppress_tokens": [PAD]}
    for length_penalty in (-2.0, -0.5, 0.0, 0.7, 1.0, 2.5):
        ours = model.generate(**arguments, length_penalty=length_penalty)
        stock = by_the_host(pytest.MonkeyPatch.context, model, **arguments, length_penalty=length_penalty)
        assert torch.equal(ours, stock), length_penalty
        if length_penalty == 2.5 and early_stopping is not True:
            arguments["early_stopping"] = True
            assert not torch.equal(ours, model.generate(**arguments, length_penalty=length_penalty))


@pytest.mark.parametrize("name", ["modern", "relative", "2017", "luong"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_long_outputs_are_the_hosts(name, settings):
    """Long enough for the search tree to be cleared of dead branches many times."""
    model = build(next(family for family in FAMILIES if family.name == name))
    arguments = {**source(rows=5), "max_new_tokens": 120, "min_new_tokens": 3, "repetition_penalty": 1.05, **settings}
    assert torch.equal(
        model.generate(**arguments, eos_token_id=None),
        by_the_host(pytest.MonkeyPatch.context, model, **arguments, eos_token_id=None),
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_outputs_reach_the_last_learned_position(settings):
    model = build(next(family for family in FAMILIES if family.name == "learned"))
    arguments = {**source(), "max_length": model.config.max_position_embeddings, "eos_token_id": None, **settings}
    ours = model.generate(**arguments)
    assert ours.shape == (B, model.config.max_position_embeddings)
    assert torch.equal(ours, by_the_host(pytest.MonkeyPatch.context, model, **arguments))


@pytest.fixture
def rows(monkeypatch):
    """The number of sources in every step."""
    rows = []
    for steps in (decoding_steps.ForwardSteps, decoding_steps.TransformerSteps):
        inner = steps.next

        def spy(self, tokens, parents, inner=inner):
            rows.append(len(tokens))
            return inner(self, tokens, parents)

        monkeypatch.setattr(steps, "next", spy)
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
    ids=str,
)
def test_rows_do_leave(any_family, rows, settings):
    """The number of rows in a step falls while sentences end, and no step runs for nobody."""
    model = build(any_family)
    torch.manual_seed(0)
    sequences = model.generate(**source(rows=9), max_new_tokens=12, suppress_tokens=[PAD], **settings)
    some_end_early = sequences.view(9, -1, sequences.shape[1])[:, :, -2:].eq(PAD).all(dim=-1).all(dim=-1).sum() >= 2
    assert rows[0] <= 9
    assert rows[-1] < 9 or not some_end_early
    assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("name", ["modern", "relative", "luong"])
@pytest.mark.parametrize(
    "search",
    [{"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.8}, {"num_beams": 3, "force_words_ids": [[6]]}],
    ids=["diverse", "constrained"],
)
def test_rows_leave_the_offline_searches(name, search, rows, monkeypatch):
    """Tokens as if all stayed to the end, though the number of rows falls. The penalty favors short outputs."""
    model = build(next(family for family in FAMILIES if family.name == name))
    arguments = {**source(rows=9), **search, "max_new_tokens": 12, "num_return_sequences": 2, "length_penalty": -1.0}
    for early_stopping in (True, False):
        rows.clear()
        ours = model.generate(**arguments, early_stopping=early_stopping)
        assert rows[0] == 9 > rows[-1]
        assert rows == sorted(rows, reverse=True)
        with monkeypatch.context() as patch:
            patch.setattr(offline_search, "follows_own_loop", lambda *_: False)
            assert torch.equal(ours, model.generate(**arguments, early_stopping=early_stopping))


def test_sampling_has_the_same_distribution(any_family):
    """
    The second and third token of 2,000 samples from one source, ours against the host's: the probabilities of the
    commonest pairs agree within four standard errors.
    """
    model, one = build(any_family), source(rows=1)
    number = 2000
    arguments = {
        "input_ids": one["input_ids"].expand(number, -1),
        "attention_mask": one["attention_mask"].expand(number, -1),
        "do_sample": True,
        "top_k": 6,
        "max_new_tokens": 3,
    }
    torch.manual_seed(0)
    ours = model.generate(**arguments)
    torch.manual_seed(1)
    stock = by_the_host(pytest.MonkeyPatch.context, model, **arguments)
    pairs = [(rows[:, 2] * V + rows[:, 3]).bincount(minlength=V * V).double() / number for rows in (ours, stock)]
    common = pairs[1].topk(8).indices
    assert len(common) == 8
    error = (pairs[1] * (1 - pairs[1]) * 2 / number).sqrt()
    assert ((pairs[0] - pairs[1])[common].abs() <= 4 * error[common]).all()


def test_samples_are_seeded_alike_while_nobody_has_left(any_family):
    model, arguments = build(any_family), {**source(), "do_sample": True, "num_return_sequences": 2}
    arguments |= {"min_new_tokens": 8, "max_new_tokens": 8}
    torch.manual_seed(0)
    ours = model.generate(**arguments)
    torch.manual_seed(0)
    assert torch.equal(ours, by_the_host(pytest.MonkeyPatch.context, model, **arguments))
    assert len(ours.unique(dim=0)) > B


# ---------------------------------------------------------------- when the host's loops run


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


FOR_THE_HOST = {
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "dictionary": {"return_dict_in_generate": True},
    "processor": {"logits_processor": LogitsProcessorList([Nothing()])},
    "criterion": {"stopping_criteria": StoppingCriteriaList([Never()])},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(2, V))},
}


def which_loop(monkeypatch, model, **arguments) -> list[bool]:
    answers = []

    def spy(*what):
        answers.append(rule(*what))
        return answers[-1]

    rule = generation.follows_own_loop
    monkeypatch.setattr(generation, "follows_own_loop", spy)
    model.generate(**source(), max_new_tokens=4, **arguments)
    return answers


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"penalty_alpha": 0.6}], ids=str)
@pytest.mark.parametrize("name", FOR_THE_HOST)
def test_what_asks_for_more_than_tokens_gets_the_hosts_loop(any_family, monkeypatch, name, settings):
    assert which_loop(monkeypatch, build(any_family), **FOR_THE_HOST[name], **settings) == [False]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 3}], ids=["1", "2", "c"])
def test_labels_and_first_tokens_of_their_own_keep_our_loop(any_family, monkeypatch, settings):
    """As Seq2SeqTrainer passes the labels, and as batches of several languages begin."""
    model = build(any_family)
    assert which_loop(monkeypatch, model, labels=torch.full((B, 5), 4), **settings) == [True]
    first = LogitsProcessorList([ForcedFirstTokens([4, 5, 6])])
    assert which_loop(monkeypatch, model, logits_processor=first, **settings) == [True]
    ids = model.generate(**source(), max_new_tokens=4, logits_processor=first, **settings)
    assert ids[:, 1].tolist() == [4, 5, 6]


def test_a_known_criterion_keeps_our_loop(any_family, monkeypatch):
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=60.0)])
    assert which_loop(monkeypatch, build(any_family), stopping_criteria=criteria) == [True]


def test_streams_static_caches_and_row_indexed_processors_get_the_hosts_loop(monkeypatch):
    model = build(FAMILIES[0])
    assert which_loop(monkeypatch, model, cache_implementation="static") == [False]
    assert which_loop(monkeypatch, model, encoder_no_repeat_ngram_size=2) == [False]
    assert which_loop(monkeypatch, model, num_beams=2, encoder_repetition_penalty=1.2) == [False]
    assert not which_loop(monkeypatch, model, streamer=Streamer())[-1]


def test_the_dictionary_is_the_hosts(any_family):
    """Its sequences and scores, with the tokens of the faster loop."""
    model = build(any_family)
    arguments = {**source(), "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9}
    full = model.generate(**arguments, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(full.sequences, model.generate(**arguments))
    assert full.sequences_scores.shape == (2 * B,)
    assert full.past_key_values is not None


def test_hooks_and_replaced_forwards_are_not_passed_over():
    """The lean step does not call the layers themselves, so it steps aside where somebody waits for their call."""
    model = FAMILIES[0].build(eos_token_id=None)
    seen = []
    handle = model.model.decoder.layers[1].register_forward_hook(lambda *_: seen.append(1))
    expected = model.generate(**source(), max_new_tokens=6)
    assert len(seen) == 6
    handle.remove()
    model.generate(**source(), max_new_tokens=6, output_hidden_states=True, return_dict_in_generate=True)
    cache = generation.Cache(layers=[])
    assert not decoding_steps.can_be_lean(model, {"use_cache": True, "past_key_values": cache})
    assert not any(decoding_steps.is_watched(module) for module in model.modules())
    assert torch.equal(model.generate(**source(), max_new_tokens=6), expected)


def in_place_of(module, forward):
    """The module with a class of its own, a subclass that only has another `forward`."""
    own = type(module)
    module.__class__ = type(f"My{own.__name__}", (own,), {"forward": lambda self, *a, **k: forward(own, self, *a, **k)})


def turned(own, self, *args, **kwargs):
    """A `forward` with other outputs."""
    outputs = own.forward(self, *args, **kwargs)
    if isinstance(outputs, tuple):
        return -outputs[0], *outputs[1:]
    if torch.is_tensor(outputs):
        return -outputs
    outputs["logits" if "logits" in outputs else "last_hidden_state"].neg_()
    return outputs


PARTS = {
    "": lambda model: model,
    "model": lambda model: model.model,
    "decoder": lambda model: model.model.decoder,
    "relative_bias": lambda model: model.model.decoder.relative_bias,
    "layer": lambda model: model.model.decoder.layers[1],
    "self_attn": lambda model: model.model.decoder.layers[1].self_attn,
    "cross_attn": lambda model: model.model.decoder.layers[1].cross_attn,
    "mlp": lambda model: model.model.decoder.layers[1].mlp,
    "up_proj": lambda model: model.model.decoder.layers[1].mlp.up_proj,
    "lm_head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("name", PARTS)
def test_the_forward_of_a_subclass_counts_at_every_token(name):
    model = copy.deepcopy(build(family("relative")))
    arguments = {**source(), "max_new_tokens": 8, "eos_token_id": None}
    before = model.generate(**arguments)
    in_place_of(PARTS[name](model), turned)
    for settings in ({}, {"num_beams": 3}):
        found = model.generate(**arguments, **settings)
        assert torch.equal(found, by_the_host(pytest.MonkeyPatch.context, model, **arguments, **settings))
        assert not torch.equal(found, before)


def test_substitutes_for_modules_are_called():
    model = FAMILIES[0].build(eos_token_id=None)
    expected = model.generate(**source(), max_new_tokens=6)
    layers = model.model.decoder.layers
    layers[0].mlp = torch.nn.Sequential(layers[0].mlp, torch.nn.Identity())
    assert torch.equal(model.generate(**source(), max_new_tokens=6), expected)


def test_inputs_of_a_subclass_count_at_every_token():
    """Here it hides what came before."""

    class Forgetful(modeling_dragoman.DragomanForConditionalGeneration):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "past_key_values": None}

    model = FAMILIES[0].build(eos_token_id=None)
    arguments = {**source(), "max_new_tokens": 6}
    before, model.__class__ = model.generate(**arguments), Forgetful
    found = model.generate(**arguments)
    assert torch.equal(found, by_the_host(pytest.MonkeyPatch.context, model, **arguments))
    assert not torch.equal(found, before)


def test_steps_stay_lean_for_copies_of_the_code_and_subclasses_that_add_to_it(tmp_path):
    model = FAMILIES[0].build()
    model.save_pretrained(tmp_path)
    name = "modeling_dragoman.DragomanForConditionalGeneration"
    loaded = get_class_from_dynamic_module(name, tmp_path).from_pretrained(tmp_path)
    assert type(loaded) is not type(model)
    model.__class__ = type("Mine", (type(model),), {"number": 1})
    for one in (model, loaded):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = one.decoding_steps(source()["input_ids"], {"use_cache": True, "past_key_values": cache}, 1)
        assert type(steps).__name__ == "TransformerSteps"


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_positions_of_one_row_hold_for_the_sources_that_stay(rows, settings):
    model, arguments = build(family("2017")), {**source(rows=9), "max_new_tokens": 12, "use_cache": False, **settings}
    arguments["position_ids"] = torch.arange(arguments["input_ids"].shape[1])[None] + 2
    ours = model.generate(**arguments)
    assert rows[-1] < rows[0] <= 9
    assert torch.equal(ours, by_the_host(pytest.MonkeyPatch.context, model, **arguments))


def test_dropout_in_training_mode_is_kept():
    model = FAMILIES[0].build(dropout=0.5, activation_dropout=0.5).train()
    torch.manual_seed(0)
    one = model.generate(**source(), max_new_tokens=8, eos_token_id=None)
    assert not torch.equal(one, model.generate(**source(), max_new_tokens=8, eos_token_id=None))
    model.eval().model.decoder.layers[1].mlp.dropout.train()  # alone, as Monte Carlo dropout has it
    torch.manual_seed(0)
    one = model.generate(**source(), max_new_tokens=8, eos_token_id=None)
    torch.manual_seed(0)
    stock = by_the_host(pytest.MonkeyPatch.context, model, **source(), max_new_tokens=8, eos_token_id=None)
    assert torch.equal(one, stock)


def test_changed_weights_count_at_once():
    """Nothing of the weights is kept from one call to the next."""
    model = FAMILIES[0].build(eos_token_id=None)
    before = model.generate(**source(), max_new_tokens=8)
    with torch.no_grad():
        model.model.decoder.layers[0].self_attn.q_proj.weight.mul_(-3)
        model.model.decoder.layers[1].mlp.up_proj.weight.mul_(-3)
    after = model.generate(**source(), max_new_tokens=8)
    assert not torch.equal(after, before)
    assert torch.equal(after, by_the_host(pytest.MonkeyPatch.context, model, **source(), max_new_tokens=8))


def test_outputs_of_the_encoder_may_be_given():
    """Encoder outputs of the caller's own, for rows that end at different steps."""
    for one in FAMILIES:
        model, arguments = build(one), source(rows=7)
        encoder_outputs = model.get_encoder()(**arguments)
        given = model.generate(encoder_outputs=encoder_outputs, attention_mask=arguments["attention_mask"], num_beams=3)
        assert torch.equal(given, model.generate(**arguments, num_beams=3))
        assert len(encoder_outputs.last_hidden_state) == 7
        assert given.shape[0] == 7
        assert PAD not in given[:, 0]
