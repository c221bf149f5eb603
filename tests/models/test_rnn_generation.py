"""What the recurrent family alone must do: its cache, its attention weights, the arguments it refuses."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from conftest import BOS, B, D, S, T, V, family, make_batch, rnn
from dragoman.models.recurrent_cache import DragomanRecurrentCache


CELLS = ("lstm", "gru", "rnn")
ENTRANCES = [
    {"attention": "none"},
    {"attention": "none", "context_every_step": True},
    {"attention": "additive", "context_every_step": True, "attention_direction": "unidirectional"},
    {"attention": "dot"},
    {"attention": "general", "input_feeding": True},
    {"attention": "scaled_dot", "attention_direction": "unidirectional"},
    {"attention": "context_as_state"},
]
STRATEGIES = [
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 9, "num_return_sequences": 2},
    {"penalty_alpha": 0.6, "top_k": 3},
]


def source(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("settings", ENTRANCES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_cached_equals_uncached(cell, settings, batch):
    model = rnn("any", cell=cell, **settings).build()
    for strategy in STRATEGIES:
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(model.generate(**source(batch), max_new_tokens=6, use_cache=use_cache, **strategy))
        assert torch.equal(*found)


# ---------------------------------------------------------------- the cache


def filled_cache(model, batch, rows_per_source=2):
    target = torch.randint(3, V, (rows_per_source * B, 2), generator=torch.Generator().manual_seed(5))
    target[:, 0] = BOS
    outputs = model(**source(batch), decoder_input_ids=target, use_cache=True)
    return outputs.past_key_values


def test_the_cache_holds_rows_for_targets_and_keys_for_sources(batch):
    cache = filled_cache(family("luong").build(), batch)
    assert [tuple(state.shape) for state in cache.states] == [(2, 2 * B, D), (2, 2 * B, D), (1, 2 * B, D)]
    assert cache.keys.shape == (B, S, D)
    assert cache.get_seq_length() == 2
    assert not cache.is_compileable
    assert cache.is_initialized
    keys, states = cache.keys, cache.states
    cache.reorder_cache(torch.tensor([1, 0, 2, 2, 5, 4]))
    for before, after in zip(states, cache.states, strict=True):
        assert torch.equal(after, before[:, [1, 0, 2, 2, 5, 4]])
    cache.batch_select_indices(torch.tensor([4, 1]))
    assert torch.equal(cache.states[0], states[0][:, [5, 0]])
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.states[1], states[1][:, [5, 5, 5, 0, 0, 0]])
    assert cache.keys is keys
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized


def test_beams_share_their_source(batch):
    model = family("bahdanau").build()
    seen = []
    model.model.decoder.recurrence.attention.score.register_forward_hook(
        lambda score, inputs, _: seen.append((tuple(inputs[0].shape), tuple(inputs[1].shape)))
    )
    projected = []
    model.model.decoder.recurrence.attention.score.k_proj.register_forward_hook(lambda *_: projected.append(1))
    model.generate(**source(batch), num_beams=4, max_new_tokens=5)
    assert set(seen) == {((B, 1, D), (B, S, D)), ((B, 4, D), (B, S, D))}  # all beams of a source begin alike
    assert len(projected) == 1  # once for the whole call


def test_contrastive_candidates_share_their_source(batch):
    model = family("bahdanau").build()
    seen = []
    model.model.decoder.recurrence.attention.score.register_forward_hook(
        lambda score, inputs, _: seen.append((tuple(inputs[0].shape), tuple(inputs[1].shape)))
    )
    model.generate(**source(batch), penalty_alpha=0.6, top_k=5, max_new_tokens=4)
    assert set(seen) == {((B, 1, D), (B, S, D)), ((B, 5, D), (B, S, D))}


def test_several_rows_for_a_source_equal_copies_of_the_source(batch):
    for name in ("gru", "luong", "edm", "plain"):
        model = family(name).build()
        target = torch.randint(3, V, (2 * B, T), generator=torch.Generator().manual_seed(5))
        shared = model(**source(batch), decoder_input_ids=target, output_attentions=True)
        copied = model(
            **{key: value.repeat_interleave(2, dim=0) for key, value in source(batch).items()},
            decoder_input_ids=target,
            output_attentions=True,
        )
        torch.testing.assert_close(shared.logits, copied.logits, rtol=0, atol=1e-12)
        for one, other in zip(shared.cross_attentions or (), copied.cross_attentions or (), strict=True):
            assert one.shape == (2 * B, 1, T, S)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_cache_goes_only_forward(batch):
    model = family("general").build()
    cache = filled_cache(model, batch)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="use advance"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(batch["input_ids"][:1], assistant_model=model)
    with pytest.raises(ValueError, match="cache_implementation='static' means nothing to a recurrent model"):
        model.generate(batch["input_ids"], cache_implementation="static")
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, but"):
        model(**source(batch), decoder_input_ids=torch.zeros(B, 1, dtype=torch.long), past_key_values=DynamicCache())


def test_a_users_cache_is_filled(batch):
    model = family("general").build()
    cache = DragomanRecurrentCache()
    sequences = model.generate(**source(batch), past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    assert cache.get_seq_length() == 4
    assert torch.equal(sequences, model.generate(**source(batch), max_new_tokens=4, eos_token_id=None))


def test_a_users_cache_is_continued(batch):
    """What it has read is not read again, and all its rows stay, however early a sentence ends."""
    model = family("general").build()
    prompt = torch.tensor([[BOS, 5, 7]] * B)
    arguments = {**source(batch), "decoder_input_ids": prompt, "max_length": 9}
    ends = [int(model.generate(**arguments, eos_token_id=None)[0, 4])]  # the first sentence, after two new tokens
    cache = model(**source(batch), decoder_input_ids=prompt[:, :2], use_cache=True).past_key_values
    # From this mask the host knows that the prompt holds what the cache has read.
    told = {"past_key_values": cache, "decoder_attention_mask": torch.ones_like(prompt)}
    sequences = model.generate(**arguments, **told, eos_token_id=ends)
    assert torch.equal(sequences, model.generate(**arguments, eos_token_id=ends))
    assert cache.states[0].shape[1] == B
    assert cache.get_seq_length() == sequences.shape[1] - 1


# ---------------------------------------------------------------- attention weights


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("settings", [one for one in ENTRANCES if one["attention"] != "none"], ids=str)
def test_weights_are_distributions_over_real_positions(settings, padding_side):
    model = rnn("any", **settings).build()
    batch = make_batch(padding_side=padding_side)
    outputs = model(**batch, output_attentions=True)
    assert len(outputs.cross_attentions) == (2 if settings["attention"] == "context_as_state" else 1)
    assert outputs.decoder_attentions is None
    for weights in outputs.cross_attentions:
        assert weights.shape == (B, 1, T, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert (weights.masked_select(batch["attention_mask"][:, None, None] == 0) == 0).all()
        if "attention_direction" in settings:
            places = batch["attention_mask"].cumsum(1)[:, None, None] - 1
            assert (weights.masked_select(places > torch.arange(T)[:, None]) == 0).all()
        else:
            assert (weights.masked_select(batch["attention_mask"][:, None, None] == 1) > 0).all()


def test_no_attention_has_no_weights(batch):
    assert family("lstm").build()(**batch, output_attentions=True).cross_attentions is None


@pytest.mark.parametrize("settings", ENTRANCES, ids=str)
def test_a_source_of_nothing_gets_no_weight(settings, batch):
    batch["attention_mask"][1] = 0
    outputs = rnn("any", **settings).build()(**batch, output_attentions=True)
    assert outputs.logits.isfinite().all()
    for weights in outputs.cross_attentions or ():
        assert (weights[1] == 0).all()
        torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0, ..., 0]))


def test_weights_during_generation(batch):
    outputs = family("edm").build().generate(
        **source(batch), max_new_tokens=4, eos_token_id=None, output_attentions=True, output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [tuple(weights.shape) for step in outputs.cross_attentions for weights in step] == [(B, 1, 1, S)] * 8
    for step in outputs.decoder_hidden_states:
        assert [tuple(states.shape) for states in step] == [(B, 1, 9), (B, 1, D), (B, 1, D)]
    assert [tuple(states.shape) for states in outputs.encoder_hidden_states] == [(B, S, 9), (B, S, D), (B, S, D)]


def test_all_layers_can_be_seen(batch):
    model = rnn("any", attention="dot", decoder_layers=3).build()
    outputs = model(**batch, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.decoder_hidden_states] == [(B, T, 9), *[(B, T, D)] * 3]
    states = model.model(
        **source(batch), decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"])
    )
    torch.testing.assert_close(outputs.decoder_hidden_states[-1], states.last_hidden_state, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    ["cross_attention_mask", "position_ids", "decoder_position_ids", "segment_ids", "decoder_segment_ids"],
)
def test_arguments_without_a_meaning_are_refused(name, batch):
    with pytest.raises(ValueError, match=f"cannot honor {name}: a recurrent network takes the tokens"):
        family("general").build()(**batch, **{name: torch.zeros(B, S, dtype=torch.long)})


def test_masks_of_other_shapes_are_refused(batch):
    model = family("general").build()
    four = torch.ones(B, 1, S, S, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask has 4 dimensions, .* give a mask of \(rows, length\)"):
        model(**{**batch, "attention_mask": four})
    with pytest.raises(ValueError, match="decoder_attention_mask has 4 dimensions"):
        model(**batch, decoder_attention_mask=four)
    right = torch.tensor([[1] * T, [1] * (T - 1) + [0], [1] * (T - 2) + [0] * 2])
    torch.testing.assert_close(model(**batch, decoder_attention_mask=right).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="decoder_attention_mask hides positions before a real token"):
        model(**batch, decoder_attention_mask=right.flip(1))


def test_the_encoder_and_the_decoder_belong_together(batch):
    model = family("general").build()
    states = model.get_encoder()(**source(batch)).last_hidden_state
    with pytest.raises(ValueError, match="needs encoder_outputs as the encoder of this model gives them"):
        model(encoder_outputs=BaseModelOutput(last_hidden_state=states), labels=batch["labels"])
    with pytest.raises(ValueError, match="needs encoder_outputs as the encoder of this model gives them"):
        model(encoder_outputs=(states,), labels=batch["labels"])
    with pytest.raises(ValueError, match="4 target rows cannot share 3 sources evenly"):
        model(**source(batch), decoder_input_ids=torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="DragomanRnnEncoder needs either token ids or embeddings"):
        model.get_encoder()()
    with pytest.raises(ValueError, match="DragomanRnnDecoder needs either token ids or embeddings"):
        model(**batch, decoder_input_ids=batch["labels"], decoder_inputs_embeds=torch.zeros(B, T, 9))


def test_a_tuple_comes_out_where_one_is_asked_for(batch):
    model = family("general").build()
    outputs = model(**batch, return_dict=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[1], model(**batch).logits)


def test_half_precision_runs(batch):
    for name in ("luong", "edm"):
        model = family(name).build(dtype=torch.bfloat16)
        assert model(**batch).loss.isfinite()
        assert model.generate(**source(batch), num_beams=2, max_new_tokens=3).shape[0] == B


def test_remote_names_keep_clear_of_the_hosts_own_caches():
    """Transformers treats classes with these words in their names differently."""
    for one in (family("general").model_class, DragomanRecurrentCache):
        assert not any(word in one.__name__.lower() for word in ("mamba", "rwkv", "xlstm", "tokenizer"))


def test_auto_classes_know_the_family(tmp_path):
    family("general").build().save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == "dragoman_rnn"
    assert loaded.config.num_hidden_layers == loaded.config.decoder_layers == 2
    assert loaded.config.get_text_config(decoder=True).num_hidden_layers == 2
    assert loaded.config.get_text_config(encoder=True).hidden_size == D
