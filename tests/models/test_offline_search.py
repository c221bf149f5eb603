"""Diverse and constrained beam search, against loops over lists and against all that a small vocabulary can write."""

import functools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import reference
from conftest import BOS, EOS, PAD, B, V, family, make_batch
from dragoman.data.tokenizers import train_tokenizer
from dragoman.models.offline_search import ConstrainedBeamSearch, DiverseBeamSearch, ForcedWords, offline_beam_search


DIVERSE = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.8}
FORCED = {"num_beams": 6, "force_words_ids": [[5, 6], [[9], [4, 4, 5]]]}
SCORED = {"return_dict_in_generate": True, "output_scores": True}
SMALL = 6  # vocabulary of which everything is tried


def generate(model, batch, **kwargs):
    return model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs)


def direct(search, **kwargs):
    """Past the checks of `generate()`."""
    return {"custom_generate": functools.partial(offline_beam_search, search), **kwargs}


def holds(tokens, word):
    return any(tokens[at : at + len(word)] == word for at in range(len(tokens)))


def sources(batch):
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield ids[None, mask.bool()]


def ending(any_family, batch, **arguments):
    """A model that ends some of its outputs early."""
    model = any_family.build()
    model.generation_config.eos_token_id = int(generate(model, batch, **arguments)[0, 3])
    return model


@pytest.fixture(params=["modern", "relative", "luong"])
def some_family(request):
    return family(request.param)


@pytest.fixture
def some_model(some_family):
    return some_family.build()


def small_batch():
    ids = torch.tensor([[3, 4, 5, 5, 2], [5, 3, 3, PAD, PAD], [4, 4, 3, 2, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


# ---------------------------------------------------------------- diverse beam search


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_one_group_is_beam_search(any_family, batch, early_stopping):
    model = ending(any_family, batch, num_beams=4)
    arguments = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7, "early_stopping": early_stopping}
    stock = generate(model, batch, **arguments, **SCORED)
    one = direct(DiverseBeamSearch, num_beam_groups=1, diversity_penalty=0.0)
    ours = generate(model, batch, **arguments, **SCORED, **one)
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.beam_indices, stock.beam_indices)
    torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, rtol=0, atol=1e-6)
    assert torch.equal(generate(model, batch, **arguments, **one), stock.sequences)


def test_no_penalty_gives_equal_groups(some_model, batch):
    stock = generate(some_model, batch, num_beams=2, num_return_sequences=2).view(B, 2, -1)
    settings = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.0, "num_return_sequences": 6}
    ours = generate(some_model, batch, **direct(DiverseBeamSearch, **settings)).view(B, 6, -1)
    assert torch.equal(ours, stock.repeat_interleave(3, dim=1))


def test_diverse_equals_loops_over_lists(any_family, batch):
    groups, w = 3, 2
    settings = {"num_beams": groups * w, "num_beam_groups": groups, "diversity_penalty": 0.8}
    settings |= {"num_return_sequences": groups * w, "max_new_tokens": 5, "length_penalty": 0.6}
    model = ending(any_family, batch, **settings)
    eos = model.generation_config.eos_token_id
    found = generate(model, batch, **settings, **SCORED)
    rows, row = found.sequences[:, 1:].tolist(), 0
    for source in sources(batch):
        expected = reference.diverse_beam_search(model, source, groups, w, 0.8, 5, 0.6, BOS, eos)
        for score, tokens in expected:
            assert rows[row] == tokens + [PAD] * (len(rows[row]) - len(tokens))
            assert found.sequences_scores[row] == pytest.approx(score, abs=1e-5)
            row += 1
    assert row == len(rows)
    assert torch.equal(generate(model, batch, **settings), found.sequences)


@pytest.mark.parametrize("name", ["modern", "gru"])
def test_diverse_equals_all_outputs(name):
    """
    Groups so wide that they hold everything: the first has all outputs in order, and every token but the end costs the
    second as often as it continues an output of the first.
    """
    model, batch = family(name).build(vocab_size=SMALL), small_batch()
    w, length = (SMALL - 1) ** 3, 3
    settings = {"num_beams": 2 * w, "num_beam_groups": 2, "diversity_penalty": 0.01, "early_stopping": "never"}
    settings |= {"max_new_tokens": length, "num_return_sequences": 9}
    found = generate(model, batch, **settings, **SCORED)
    scores, rows = found.sequences_scores.view(B, 9), found.sequences[:, 1:].reshape(B, 9, -1).tolist()
    for number, source in enumerate(sources(batch)):
        expected = []
        for tokens, values in reference.every_output(model, source, length, BOS, EOS).items():
            costs = [0.01 * (SMALL - 1) ** step for step, token in enumerate(tokens) if token != EOS]
            for total in (sum(values), sum(values) - sum(costs)):
                expected.append((total / len(tokens), [*tokens, *[PAD] * (length - len(tokens))]))
        expected.sort(key=lambda one: -one[0])
        assert scores[number].tolist() == pytest.approx([score for score, _ in expected[:9]], abs=1e-5)
        assert rows[number] == [tokens for _, tokens in expected[:9]]


def test_groups_differ(some_model, batch):
    stock = generate(some_model, batch, num_beams=6, num_return_sequences=6).view(B, 6, -1)
    found = generate(some_model, batch, **{**DIVERSE, "diversity_penalty": 5.0}, num_return_sequences=6).view(B, 6, -1)
    for row in range(B):
        assert len(set(found[row, :, 1].tolist())) >= 3  # a first token of its own for each group
        assert len(set(found[row, :, 1].tolist())) >= len(set(stock[row, :, 1].tolist()))


# ---------------------------------------------------------------- constrained beam search


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_nothing_forced_is_beam_search(any_family, batch, early_stopping):
    """A word that the prompt's automaton has seen from the start forces nothing: here one of no tokens."""
    model = ending(any_family, batch, num_beams=4)
    arguments = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7, "early_stopping": early_stopping}
    nothing = direct(ConstrainedBeamSearch, force_words_ids=[[[], [7]]])
    assert torch.equal(generate(model, batch, **arguments, **nothing), generate(model, batch, **arguments))


@pytest.mark.parametrize(
    "words",
    [[[4]], [[3, 4], [5]], [[[3, 3, 5], [5]], [4]], [[4, 4, 5]], [[[0], [3, 5]]], [[3, 4, 3, 5]]],
    ids=["one", "two", "either", "repeated", "short or long", "no room"],
)
@pytest.mark.parametrize("name", ["modern", "bahdanau"])
def test_constrained_equals_all_outputs(name, words):
    """With a beam that holds everything, the best outputs that hold the words are found, in order."""
    model, batch, length = family(name).build(vocab_size=SMALL), small_batch(), 4
    settings = {"num_beams": 2 * (SMALL - 1) ** 3, "early_stopping": "never", "max_new_tokens": length}
    forms = [word if isinstance(word[0], list) else [word] for word in words]
    for number, source in enumerate(sources(batch)):
        outputs = reference.every_output(model, source, length, BOS, EOS)
        expected = sorted(
            (-sum(values) / len(tokens), [*tokens, *[PAD] * (length - len(tokens))])
            for tokens, values in outputs.items()
            if all(any(holds(list(tokens), form) for form in word) for word in forms)
        )[:5]
        row = {key: value[number : number + 1] for key, value in batch.items()}
        found = generate(model, row, **settings, force_words_ids=words, num_return_sequences=len(expected), **SCORED)
        assert [-score for score in found.sequences_scores.tolist()] == pytest.approx(
            [score for score, _ in expected], abs=1e-5
        )
        width = found.sequences.shape[1] - 1
        assert found.sequences[:, 1:].tolist() == [tokens[:width] for _, tokens in expected]


@pytest.mark.parametrize("num_beams", [2, 7])
@pytest.mark.parametrize(
    "words",
    [[[5, 6], [9]], [[5, 6, 5, 7]], [[5, 6], [6, 5]], [[[5, 6, 6], [7, 8]], [[9], [10, 11]]], [[5], [5, 6], [6, 7, 8]]],
    ids=["two", "repeated", "overlapping", "either", "contained"],
)
def test_words_are_always_there(some_model, batch, words, num_beams):
    """Even when nothing else fits, or an end is near, and with beams for fewer tokens than are forced."""
    forms = [word if isinstance(word[0], list) else [word] for word in words]
    shortest = sum(min(map(len, word)) for word in forms)
    for room in (shortest, shortest + 1, 10):
        sequences = generate(some_model, batch, force_words_ids=words, num_beams=num_beams, max_new_tokens=room)
        assert sequences.shape[1] <= room + 1
        for row in sequences[:, 1:].tolist():
            assert all(any(holds(row, form) for form in word) for word in forms)


def test_automata_follow_the_last_tokens():
    words = ForcedWords([[4, 4, 5], [[6], [4, 5, 4, 6]]], V, torch.device("cpu"))
    assert words.total == 4
    states = words.begin(1, 1)
    for token, after, needed in [
        (4, [1, 0, 1], 3), (4, [2, 0, 1], 2), (4, [2, 0, 1], 2), (5, [3, 0, 2], 1),
        (4, [3, 0, 3], 1), (6, [3, 1, 4], 0), (7, [3, 1, 4], 0),
    ]:  # fmt: skip
        states = words.advance(states, torch.tensor([[token]]))
        assert states[0, 0].tolist() == after
        assert words.needed(states).item() == needed


def test_no_room_for_the_words(some_model, batch):
    with pytest.raises(ValueError, match="force_words_ids have 3 tokens, but max_length=3 leaves room for 2 new ones"):
        generate(some_model, batch, **FORCED, max_new_tokens=2)
    with pytest.raises(ValueError, match="force_words_ids have 4 tokens"):  # though 5 6 7 would hold both
        generate(some_model, batch, num_beams=3, force_words_ids=[[5, 6], [6, 7]], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"only 0 of num_return_sequences=1 outputs .* another setting forbids one"):
        generate(some_model, batch, **FORCED, bad_words_ids=[[6]])
    with pytest.raises(ValueError, match="only 1 of num_return_sequences=2 outputs"):
        generate(some_model, batch, num_beams=3, force_words_ids=[[5, 6]], max_new_tokens=2, num_return_sequences=2)


# ---------------------------------------------------------------- both


@pytest.fixture(params=[DIVERSE, FORCED], ids=["diverse", "constrained"])
def search(request):
    return request.param


def test_scores_are_those_of_the_steps(model, batch, search):
    found = generate(model, batch, **search, num_return_sequences=2, length_penalty=0.0, output_logits=True, **SCORED)
    steps = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    torch.testing.assert_close(steps.sum(dim=1), found.sequences_scores, rtol=0, atol=1e-5)
    assert len(found.logits) == len(found.scores) >= found.sequences.shape[1] - 1  # the search may have gone on
    assert found.logits[0].shape == found.scores[0].shape == (6 * B, V)
    assert torch.equal(generate(model, batch, **search, num_return_sequences=2, length_penalty=0.0), found.sequences)
    without = generate(model, batch, **search, return_dict_in_generate=True)
    assert without.sequences_scores is without.scores is without.logits is None


def test_static_caches_and_caches_of_ones_own(any_transformer, batch, search):
    model = any_transformer.build()
    wanted = generate(model, batch, **search)
    assert torch.equal(generate(model, batch, **search, cache_implementation="static"), wanted)
    cache = generate(model, batch, **search, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="pass no filled cache"):
        generate(model, batch, **search, past_key_values=cache)


def test_processors_and_criteria_count(some_model, batch, search):
    rows = generate(some_model, batch, **search, min_new_tokens=4, bad_words_ids=[[7], [13]], num_return_sequences=3)
    assert not {7, 13} & set(rows.flatten().tolist())
    assert (rows[:, 1:5] != EOS).all()
    choices = [[4, 5, 6, 9], [5, 6, 9, 12], [5, 6, 9]]
    allowed = generate(some_model, batch, **search, prefix_allowed_tokens_fn=lambda row, ids: choices[row])
    assert 12 not in allowed[[0, 2]]
    assert 4 not in allowed[1:]


def test_stop_strings(some_family, batch, search):
    tokenizer = train_tokenizer(["abcdefghijklmnopqrs"], kind="char")
    model = some_family.build()
    letters = tokenizer.batch_decode(torch.arange(10, V)[:, None])
    settings = {"tokenizer": tokenizer, "stop_strings": letters, "suppress_tokens": [BOS, PAD, EOS]}
    settings["length_penalty"] = 0.0  # short ones are better
    texts = tokenizer.batch_decode(generate(model, batch, **search, **settings)[:, 1:], skip_special_tokens=True)
    assert any(text[-1:] in letters for text in texts)
    assert not any(letter in text[:-1] for letter in letters for text in texts)


def test_settings_of_the_model(some_family, batch, tmp_path):
    model = some_family.build()
    wanted = generate(model, batch, **DIVERSE)
    model.generation_config.update(**DIVERSE)
    assert torch.equal(generate(model, batch), wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    again.generation_config.max_length = 11
    assert torch.equal(generate(again, batch), wanted)
    passed = GenerationConfig(**DIVERSE, max_length=11)
    assert torch.equal(generate(some_family.build(), batch, generation_config=passed), wanted)
    plain = some_family.build()
    assert torch.equal(generate(again, batch, num_beams=1), generate(plain, batch))  # a mode that the call chooses
    assert torch.equal(generate(again, batch, num_beam_groups=1), generate(plain, batch, num_beams=6))


def test_a_process_that_is_done_waits_for_the_others(some_family, batch, search):
    """With synced_gpus all of them take the same number of steps."""
    model = some_family.build()
    wanted, forwards, rounds = generate(model, batch, **search), [], iter([*[True] * 14, False])
    model.register_forward_hook(lambda *_: forwards.append(1))
    model._has_unfinished_sequences = lambda done, synced_gpus, device: next(rounds) if synced_gpus else not done
    assert torch.equal(generate(model, batch, **search, synced_gpus=True), wanted)
    assert len(forwards) == 14 > wanted.shape[1]


def test_impossible_settings_are_refused(batch, search):
    model = family("modern").build()
    name = "diverse" if search is DIVERSE else "constrained"
    for changes, sentence in [
        ({"do_sample": True}, "does not sample: drop it, or give do_sample=False"),
        ({"streamer": BaseStreamer()}, "has no output before its end: leave out the streamer"),
        ({"assistant_model": model}, "takes no assistant"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "records neither attentions nor hidden states"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} beam search \(.*\) {sentence}"):
            generate(model, batch, **{**search, **changes})
    with pytest.raises(ValueError, match=r"penalty_alpha=0\.6 asks for contrastive search"):
        generate(model, batch, **search, penalty_alpha=0.6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({**DIVERSE, "num_beams": 4}, "num_beam_groups=3 does not divide num_beams=4"),
        ({**DIVERSE, "num_beams": 1}, "num_beam_groups=3 does not divide num_beams=1"),
        ({**DIVERSE, "diversity_penalty": None}, r"diversity_penalty=None must be greater than 0"),
        ({**DIVERSE, "diversity_penalty": -1.0}, r"diversity_penalty=-1\.0 must be greater than 0"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, r"diversity_penalty=0\.5 needs num_beam_groups of at least 2"),
        ({**DIVERSE, "force_words_ids": [[5]]}, "force_words_ids and num_beam_groups=3 exclude each other"),
        ({**FORCED, "num_beams": 1}, "force_words_ids need num_beams of at least 2, got 1"),
        ({**FORCED, "force_words_ids": []}, r"force_words_ids=\[\] must be a list of words"),
        ({**FORCED, "force_words_ids": [5, 6]}, "force_words_ids hold 5: each word must be a list of token ids"),
        ({**FORCED, "force_words_ids": [[5], []]}, r"force_words_ids hold \[\]: each word must be a list"),
        ({**FORCED, "force_words_ids": [[[5], []]]}, "each word must be a list of token ids"),
        ({**FORCED, "force_words_ids": [[5, V]]}, f"force_words_ids hold {V}, but the target vocabulary has the ids 0"),
        ({**FORCED, "force_words_ids": [[5, EOS]]}, r"force_words_ids hold \[5, 2\], but 2 ends the output"),
        ({"num_beams": 3, "constraints": ["anything"]}, "constraints were objects of classes that Transformers no"),
        ({"penalty_alpha": 0.6, "force_words_ids": [[5]]}, "contrastive search, force_words_ids for beams"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(batch, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(family("gru").build(), batch, **changes)


def test_both_paddings_give_the_same(model, search):
    right, left = make_batch(padding_side="right"), make_batch(padding_side="left")
    assert torch.equal(generate(model, right, **search), generate(model, left, **search))
