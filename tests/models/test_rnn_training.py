"""Scheduled sampling: who decides what the decoder is fed, and that the same seed decides the same."""

import itertools
import math

import pytest
import torch

from conftest import B, D, T, V, rnn
from dragoman.models.scheduled_sampling import ScheduledSampling, teacher_forcing_schedule
from reference_rnn import rnn_logits


STEPWISE = {"attention": "additive", "context_every_step": True}


def coins(ratio, coin="token", feedback="argmax", rows=400, length=50, seed=0, predict=None):
    generator = torch.Generator().manual_seed(seed)
    return ScheduledSampling.toss(rows, length, ratio, coin, feedback, generator, predict)


# ---------------------------------------------------------------- the schedule


def test_schedules_are_their_formulas():
    assert [teacher_forcing_schedule(step, "constant", 0.5) for step in (0, 9)] == [0.5, 0.5]
    assert teacher_forcing_schedule(30, "linear", k=0.9, slope=0.01) == pytest.approx(0.6)
    assert teacher_forcing_schedule(100, "linear", k=0.9, slope=0.01, minimum=0.2) == 0.2
    assert teacher_forcing_schedule(7, "exponential", k=0.9) == pytest.approx(0.9**7)
    assert teacher_forcing_schedule(12, "inverse_sigmoid", k=5) == pytest.approx(5 / (5 + math.exp(12 / 5)))
    assert teacher_forcing_schedule(10**6, "inverse_sigmoid", k=5, minimum=0.1) == 0.1
    for kind, k in (("linear", 1.0), ("exponential", 0.99), ("inverse_sigmoid", 20)):
        ratios = [teacher_forcing_schedule(step, kind, k, slope=0.01 * (kind == "linear")) for step in range(60)]
        assert all(0 <= later < earlier <= 1 for earlier, later in itertools.pairwise(ratios))


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"kind": "cosine"}, "schedule 'cosine' is unknown: choose one of constant, linear, exponential, inverse_sigmoid"),
    ({"kind": "constant", "k": 1.5}, "k=1.5 .* constant must be between 0 and 1"),
    ({"kind": "linear", "k": -1.0}, "k=-1.0 .* linear must be between 0 and 1"),
    ({"kind": "exponential", "k": 1.0}, "k=1.0 .* exponential must be more than 0 and less than 1"),
    ({"kind": "inverse_sigmoid", "k": 0.5}, "k=0.5 .* inverse_sigmoid must be at least 1"),
    ({"kind": "exponential", "k": 0.5, "slope": 0.1}, "slope=0.1 .* must be 0, or positive where kind is linear"),
    ({"kind": "linear", "slope": -0.1}, "slope=-0.1"),
    ({"minimum": 2.0}, "minimum=2.0 .* must be between 0 and 1"),
])  # fmt: skip
def test_schedules_refuse(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        teacher_forcing_schedule(3, **arguments)


# ---------------------------------------------------------------- the coins


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_coin_for_every_token(ratio):
    gold = coins(ratio).gold
    assert gold.shape == (400, 50)
    assert gold[:, 0].all()  # the start token is fed once, whatever the coins say
    assert gold[:, 1:].float().mean() == pytest.approx(ratio, abs=0.02)
    if 0 < ratio < 1:
        assert gold[:, 1:].float().mean(0).std() < 0.05
        assert gold[:, 1:].float().mean(1).std() < 0.1


def test_a_coin_for_every_step_of_the_batch():
    gold = coins(0.3, coin="step", length=2000).gold
    assert gold.shape == (1, 2000)
    assert gold[0, 0]
    assert gold.float().mean() == pytest.approx(0.3, abs=0.04)


def test_sampled_feedback_follows_the_distribution():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0]).expand(20_000, 1, 4)
    sampling = coins(0.0, feedback="sample", rows=20_000, length=2, predict=lambda states: logits)
    tokens = sampling.own_tokens(torch.zeros(20_000, 1, D), 1)
    assert tokens.shape == (20_000, 1)
    frequencies = torch.bincount(tokens[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logits[0, 0].softmax(-1), rtol=0, atol=0.015)
    argmax = coins(0.0, rows=20_000, length=2, predict=lambda states: logits)
    assert (argmax.own_tokens(torch.zeros(20_000, 1, D), 1) == 1).all()


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("settings", [{"attention": "none"}, STEPWISE, {"attention": "dot", "input_feeding": True}])
def test_scheduled_sampling_equals_loops(settings, batch):
    model = rnn("any", **settings).build()
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    generator = torch.Generator().manual_seed(4)
    gold = ScheduledSampling.toss(B, T, 0.5, "token", "argmax", torch.Generator().manual_seed(4), model.lm_head).gold
    assert not gold.all()
    logits = model(
        input_ids=batch["input_ids"],
        decoder_input_ids=target,
        teacher_forcing_ratio=0.5,
        teacher_forcing_generator=generator,
    ).logits
    weights = dict(model.named_parameters(remove_duplicate=False))
    for row in range(B):
        expected, _ = rnn_logits(
            weights, model.config, batch["input_ids"][row].tolist(), target[row].tolist(), gold[row].tolist()
        )
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("coin", ["token", "step"])
@pytest.mark.parametrize("feedback", ["argmax", "sample"])
def test_same_seed_same_coins(coin, feedback, batch):
    model = rnn("any", teacher_forcing_coin=coin, teacher_forcing_feedback=feedback).build()

    def losses(seed):
        """Two micro-batches of an optimizer step that share its generator."""
        generator = torch.Generator().manual_seed(seed)
        torch.rand(seed)  # torch's own generator has no part in it
        return [
            model(**batch, teacher_forcing_ratio=0.4, teacher_forcing_generator=generator).loss.item() for _ in range(2)
        ]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    assert losses(1)[0] != losses(1)[1]


def test_without_a_generator_torchs_own_tosses(batch):
    model = rnn("any", **STEPWISE).build()

    def loss(seed):
        torch.manual_seed(seed)
        return model(**batch, teacher_forcing_ratio=0.4).loss.item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_the_configured_ratio_counts_in_training_only(batch):
    model = rnn("any", teacher_forcing_ratio=0.0).build()
    forced = model(**batch, teacher_forcing_ratio=1.0).logits
    free = model(**batch, teacher_forcing_ratio=0.0).logits
    assert not torch.allclose(forced, free)
    torch.testing.assert_close(model(**batch).logits, forced)
    model.train()
    torch.testing.assert_close(model(**batch).logits, free)
    torch.testing.assert_close(model(**batch, teacher_forcing_ratio=1.0).logits, forced)


def test_free_running_feeds_the_models_own_tokens(batch):
    """At ratio 0 the logits do not depend on the target, and their argmax is what greedy search finds."""
    model = rnn("any", **STEPWISE).build()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    free = model(**source, decoder_input_ids=target, teacher_forcing_ratio=0.0).logits
    other = target.clone()
    other[:, 1:] = (other[:, 1:] + 7) % V
    assert torch.equal(free, model(**source, decoder_input_ids=other, teacher_forcing_ratio=0.0).logits)
    greedy = model.generate(**source, max_new_tokens=T, eos_token_id=None)
    assert torch.equal(free.argmax(-1), greedy[:, 1:])


def test_embedded_targets_are_sampled_too(batch):
    model = rnn("any", **STEPWISE).build()
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    embeds = model.get_decoder().embed_tokens(target)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def logits(**kwargs):
        generator = torch.Generator().manual_seed(4)
        return model(**source, **kwargs, teacher_forcing_ratio=0.5, teacher_forcing_generator=generator).logits

    assert torch.equal(logits(decoder_inputs_embeds=embeds), logits(decoder_input_ids=target))


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_is_a_chance(ratio, batch):
    with pytest.raises(ValueError, match=f"teacher_forcing_ratio={ratio} must be between 0 and 1"):
        rnn("any").build()(**batch, teacher_forcing_ratio=ratio)


def test_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        rnn("any").build().gradient_checkpointing_enable()


# ---------------------------------------------------------------- initial weights


def test_initial_weights_scale_with_the_width():
    model = rnn("any", embedding_dim=300, hidden_size=200, attention="additive", share_embeddings=False).build()
    encoder, recurrence = model.model.encoder, model.model.decoder.recurrence
    assert encoder.rnn.weight_ih_l0.std().item() == pytest.approx(300**-0.5, rel=0.05)
    assert recurrence.rnn.weight_hh_l1.std().item() == pytest.approx(200**-0.5, rel=0.05)
    assert recurrence.combine.weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert encoder.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    forget = encoder.rnn.bias_ih_l0.chunk(4)
    assert (forget[1] == 1).all()
    assert all((forget[part] == 0).all() for part in (0, 2, 3))
    assert (encoder.rnn.bias_hh_l0 == 0).all()
    tied = rnn("any", embedding_dim=200, hidden_size=200, tie_lm_head=True).build()
    assert tied.lm_head.weight.std().item() == pytest.approx(1.0, rel=0.05)
    fixed = rnn("any", embedding_dim=300, hidden_size=200, init_std=0.08).build()
    for name, parameter in fixed.named_parameters():
        if name.endswith("weight") or ".weight_" in name:
            assert parameter.std().item() == pytest.approx(0.08, rel=0.1), name
