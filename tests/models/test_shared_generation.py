"""What every model of every family must do in `generate()`."""

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

import reference
from conftest import BOS, EOS, FAMILIES, PAD, B, V, make_batch
from dragoman.data.tokenizers import train_tokenizer


STRATEGIES = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3},
    "n-best": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7},
    "sampling": {"do_sample": True, "top_k": 9, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES.keys())
def strategy(request):
    return request.param


def generate(model, batch, **kwargs):
    torch.manual_seed(3)
    return model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs)


def test_cached_equals_uncached(model, batch, strategy):
    assert torch.equal(
        generate(model, batch, **strategy, use_cache=True), generate(model, batch, **strategy, use_cache=False)
    )


def test_stepwise_logits_equal_full_logits(model, batch):
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    full = model(**source, decoder_input_ids=target).logits
    encoder_outputs = model.get_encoder()(**source)
    cache, steps = None, []
    for t in range(target.shape[1]):
        outputs = model(
            encoder_outputs=encoder_outputs,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=target[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    assert cache.get_seq_length() == target.shape[1]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-12)


def test_padding_changes_no_translation(model, strategy):
    if strategy.get("do_sample"):
        strategy = {**strategy, "num_return_sequences": strategy.get("num_return_sequences", 1)}
    right, left = make_batch(padding_side="right"), make_batch(padding_side="left")
    assert torch.equal(generate(model, right, **strategy), generate(model, left, **strategy))


@pytest.mark.parametrize("name", ["greedy", "beam", "n-best", "contrastive"])
def test_the_batch_changes_no_translation(model, batch, name):
    together = generate(model, batch, **STRATEGIES[name])
    each = STRATEGIES[name].get("num_return_sequences", 1)
    for row in range(B):
        alone = generate(model, {key: value[row : row + 1] for key, value in batch.items()}, **STRATEGIES[name])
        ours = together[row * each : (row + 1) * each]
        width = min(alone.shape[1], ours.shape[1])
        assert torch.equal(ours[:, :width], alone[:, :width])
        assert (ours[:, width:] == PAD).all()
        assert (alone[:, width:] == PAD).all()


def test_shared_sources_equal_the_hosts_copies(any_family, batch, strategy):
    """The host library copies the source for every beam. Here the beams share it, with the same result."""

    class Copying(any_family.model_class):
        def _expand_inputs_for_generation(self, **kwargs):
            return GenerationMixin._expand_inputs_for_generation(self, **kwargs)

        def _reorder_cache(self, past_key_values, beam_idx):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values

    ours = any_family.build()
    copying = Copying(any_family.config()).double().eval()
    copying.load_state_dict(ours.state_dict())
    copying.generation_config = ours.generation_config
    if strategy.get("do_sample"):  # as soon as a finished sentence leaves the batch, others draw other numbers
        strategy = {**strategy, "min_new_tokens": 10}
    assert torch.equal(generate(ours, batch, **strategy), generate(copying, batch, **strategy))


def test_scores_of_n_best_are_log_probabilities(model, batch):
    outputs = generate(
        model, batch, num_beams=4, num_return_sequences=4, length_penalty=0.0, suppress_tokens=[PAD],
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row in range(4 * B):
        sequence = outputs.sequences[row]
        length = (sequence[1:] != PAD).sum()
        source = {name: batch[name][row // 4 : row // 4 + 1] for name in ("input_ids", "attention_mask")}
        logits = model(**source, decoder_input_ids=sequence[None, :-1]).logits[0]
        picked = logits.log_softmax(-1)[torch.arange(length), sequence[1 : 1 + length]]
        torch.testing.assert_close(outputs.sequences_scores[row].double(), picked.sum(), rtol=1e-5, atol=1e-5)
    scores = outputs.sequences_scores.view(B, 4)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


# ---------------------------------------------------------------- contrastive search


@pytest.mark.parametrize("penalty_alpha", PENALTIES := [0.2, 0.6, 1.0])
def test_contrastive_equals_brute_force(any_family, batch, penalty_alpha):
    # Pairwise: each family meets all penalties and both sizes, and each penalty both sizes.
    number = [one.name for one in FAMILIES].index(any_family.name)
    top_k = (2, 5)[(number + PENALTIES.index(penalty_alpha)) % 2]
    model = any_family.build()
    expected = reference.contrastive_search(
        model, batch["input_ids"], batch["attention_mask"], penalty_alpha, top_k, 7, BOS, EOS, PAD
    )
    found = generate(model, batch, penalty_alpha=penalty_alpha, top_k=top_k, max_new_tokens=7)
    assert torch.equal(found, expected)


def test_contrastive_with_no_penalty_is_greedy(model, batch):
    greedy = generate(model, batch)
    assert torch.equal(generate(model, batch, penalty_alpha=1e-9, top_k=4), greedy)
    assert torch.equal(generate(model, batch, penalty_alpha=0.0, top_k=4), greedy)
    assert torch.equal(generate(model, batch, penalty_alpha=0.6, top_k=1), greedy)
    assert not torch.equal(generate(model, batch, penalty_alpha=0.6, top_k=4), greedy)


def test_top_k_is_four_unless_the_call_says_otherwise(model, batch):
    wanted = generate(model, batch, penalty_alpha=0.6, top_k=4)
    assert torch.equal(generate(model, batch, penalty_alpha=0.6), wanted)
    model.generation_config.top_k = 50  # as an evaluation by Seq2SeqTrainer leaves it
    model.generation_config.num_beams = 5  # as many trained models have it
    assert torch.equal(generate(model, batch, penalty_alpha=0.6), wanted)
    assert torch.equal(
        generate(model, batch, generation_config=GenerationConfig(penalty_alpha=0.6, max_length=11)), wanted
    )
    two = generate(model, batch, penalty_alpha=0.6, top_k=2)
    passed = GenerationConfig(penalty_alpha=0.6, top_k=2, max_length=11)
    assert torch.equal(generate(model, batch, generation_config=passed), two)
    assert not torch.equal(two, wanted)


def test_a_model_can_be_contrastive_by_default(model, batch, tmp_path):
    wanted = generate(model, batch, penalty_alpha=0.6, top_k=4)
    model.generation_config.penalty_alpha = 0.6
    assert torch.equal(generate(model, batch), wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(generate(again, batch), wanted)
    beams = generate(again, batch, num_beams=3)  # what the call says about beams still counts
    again.generation_config.penalty_alpha = None
    assert torch.equal(generate(again, batch, num_beams=3), beams)


def test_contrastive_search_can_be_switched_off(model, batch):
    greedy = generate(model, batch)
    model.generation_config.penalty_alpha = 0.6
    assert torch.equal(generate(model, batch, penalty_alpha=0.0), greedy)
    assert torch.equal(generate(model, batch, top_k=1), greedy)
    sampled = generate(model, batch, do_sample=True, top_k=9)
    model.generation_config.penalty_alpha = None
    assert torch.equal(generate(model, batch, do_sample=True, top_k=9), sampled)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended = True


def test_contrastive_streams(model, batch):
    source = {name: value[:1] for name, value in batch.items()}
    streamer = Collector()
    sequence = generate(model, source, penalty_alpha=0.6, top_k=4, streamer=streamer)
    assert torch.cat([token.flatten() for token in streamer.tokens]).tolist() == sequence[0].tolist()
    assert streamer.ended


def test_contrastive_returns_what_greedy_returns(any_family, batch):
    model = any_family.build()
    if any_family.is_transformer:
        model.set_attn_implementation("eager")
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
             "output_hidden_states": True, "output_attentions": True, "eos_token_id": None}  # fmt: skip
    contrastive = generate(model, batch, penalty_alpha=1e-9, top_k=4, **asked)
    greedy = generate(model, batch, **asked)
    assert type(contrastive) is type(greedy)
    assert torch.equal(contrastive.sequences, greedy.sequences)
    for name in ("scores", "logits"):
        assert len(contrastive[name]) == len(greedy[name])
        for ours, stock in zip(contrastive[name], greedy[name], strict=True):
            torch.testing.assert_close(ours.float(), stock.float(), rtol=1e-5, atol=1e-6)
    for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        assert (contrastive[name] is None) == (greedy[name] is None)
        for ours, stock in zip(contrastive[name] or (), greedy[name] or (), strict=True):
            for layer, stock_layer in zip(ours or (), stock or (), strict=True):
                torch.testing.assert_close(layer, stock_layer, rtol=0, atol=1e-12)


def test_contrastive_respects_processors_and_criteria(model, batch):
    sequence = generate(model, batch, penalty_alpha=0.6, top_k=4, min_new_tokens=4, bad_words_ids=[[7], [9]])
    assert not {7, 9} & set(sequence.flatten().tolist())
    assert (sequence[:, 1:5] != EOS).all()
    forced = generate(model, batch, penalty_alpha=0.9, top_k=4, forced_bos_token_id=13)
    assert (forced[:, 1] == 13).all()


def test_contrastive_refuses_what_it_cannot_do(model, batch):
    with pytest.raises(ValueError, match="one beam and does not sample"):
        generate(model, batch, penalty_alpha=0.6, num_beams=3)
    with pytest.raises(ValueError, match="one beam and does not sample"):
        generate(model, batch, penalty_alpha=0.6, do_sample=True)
    with pytest.raises(ValueError, match=r"between 0 .* and 1"):
        generate(model, batch, penalty_alpha=1.5)
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(model, batch, penalty_alpha=0.6, num_return_sequences=2)


# ---------------------------------------------------------------- ends and limits


def test_generation_ends_at_eos(any_family, batch):
    model = any_family.build()
    first = generate(model, batch)[:, 1]
    model.generation_config.eos_token_id = int(first[0])
    ended = generate(model, batch)
    assert ended[0, 1] == first[0]
    assert (ended[0, 2:] == PAD).all()


def test_bos_and_eos_may_be_the_same_token(any_family, batch):
    model = any_family.build(bos_token_id=2, decoder_start_token_id=2, eos_token_id=2)
    assert generate(model, batch).shape[1] > 1
    assert (generate(model, batch)[:, 0] == 2).all()


def test_a_fresh_model_is_not_cut_at_twenty_tokens(any_family, batch):
    torch.manual_seed(0)
    model = any_family.model_class(any_family.config(eos_token_id=None)).eval()
    assert model.generate(batch["input_ids"]).shape[1] > 21


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"penalty_alpha": 0.6}])
def test_the_calls_length_beats_the_saved_one(model, batch, strategy):
    model.generation_config.max_new_tokens = 8
    assert generate(model, batch, max_new_tokens=3, eos_token_id=None, **strategy).shape[1] == 4
    assert generate(model, batch, eos_token_id=None, **strategy).shape[1] == 9


def test_settings_that_cannot_work_are_refused(any_family, batch):
    model = any_family.build()
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a model that also runs without its source"):
        generate(model, batch, guidance_scale=2.0)
    with pytest.raises(ValueError, match=f"forced_bos_token_id={V} holds {V}, but the target vocabulary has the ids 0"):
        generate(model, batch, forced_bos_token_id=V)
    with pytest.raises(ValueError, match=f"suppress_tokens=.* holds {V}, but the target vocabulary"):
        generate(model, batch, suppress_tokens=[3, V])
    if model.config.source_vocab_size is not None:
        with pytest.raises(ValueError, match=r"encoder_repetition_penalty=1\.2 compares source with target ids"):
            generate(model, batch, encoder_repetition_penalty=1.2)
    for ids in (torch.zeros(B, 0, dtype=torch.long), torch.tensor([3, 4])):
        with pytest.raises(ValueError, match="give rows of equal length with at least one token"):
            model.generate(ids)


def test_foreign_ids_are_refused(model, batch):
    batch["input_ids"][1, 1] = 99
    with pytest.raises(ValueError, match=r"input_ids hold 99, but the vocabulary has \d+ ids"):
        generate(model, batch)
    with pytest.raises(ValueError, match=f"decoder_input_ids hold {V}, but the vocabulary has {V} ids"):
        generate(model, make_batch(), decoder_input_ids=torch.tensor([[BOS, V]] * B))


def test_a_prompt_is_continued(model, batch):
    prompt = torch.tensor([[BOS, 5, 7]] * B)
    for settings in STRATEGIES.values():
        sequences = generate(model, batch, decoder_input_ids=prompt, **settings)
        assert (sequences[:, :3] == prompt[0]).all()
        assert torch.equal(sequences, generate(model, batch, decoder_input_ids=prompt, use_cache=False, **settings))


def test_stock_arguments_survive(model, batch):
    """Encoder outputs of one's own, and the lengths that a call asks for."""
    encoder_outputs = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for settings in STRATEGIES.values():
        torch.manual_seed(3)
        given = model.generate(encoder_outputs=encoder_outputs, attention_mask=batch["attention_mask"], **settings)
        assert torch.equal(given, generate(model, batch, **settings))
    assert generate(model, batch, max_new_tokens=4, eos_token_id=None).shape[1] == 5
    assert generate(model, batch, max_length=4, eos_token_id=None).shape[1] == 4


def test_sources_without_a_mask_are_counted(model, batch):
    outputs = model.get_encoder()(input_ids=batch["input_ids"])
    expected = model.generate(batch["input_ids"], num_beams=3)
    assert torch.equal(model.generate(encoder_outputs=outputs.to_tuple(), num_beams=3), expected)
    with pytest.raises(ValueError, match="1 target rows cannot share the 3 sources of encoder_outputs evenly"):
        model.generate(batch["input_ids"][:1], encoder_outputs=outputs, num_beams=3)


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_contrastive_search_stops_at_strings(any_family, batch, where):
    """Wherever they are given; the host drops the tokenizer that it needs for them."""
    tokenizer = train_tokenizer(["abcdefghijklmnopqrs"], kind="char")
    assert len(tokenizer) == V
    model = any_family.build(eos_token_id=None)
    found = generate(model, batch, penalty_alpha=0.6)
    letter = tokenizer.decode(found[0, 3])
    given = {"stop_strings": [letter]} if where == "call" else {}
    if where == "config":
        given = {"generation_config": GenerationConfig(stop_strings=[letter], max_length=11)}
    if where == "model":
        model.generation_config.stop_strings = [letter]
    stopped = generate(model, batch, penalty_alpha=0.6, tokenizer=tokenizer, **given)
    first = found[0].tolist().index(found[0, 3])
    assert stopped[0, : first + 1].tolist() == found[0, : first + 1].tolist()
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        generate(model, batch, penalty_alpha=0.6, **given)
