"""Every recurrent network against loops written from its equations, and against the plain classes of its papers."""

import pytest
import torch

from conftest import B, D, S, T, V, make_batch, rnn
from reference_rnn import EDM, AttentionEDM, GruTwin, rnn_logits


CELLS = ("lstm", "gru", "rnn")
WITHOUT_ATTENTION = ({"attention": "none"}, {"attention": "none", "context_every_step": True})
WITH_ATTENTION = (
    *(
        {"attention": attention, **entrance}
        for attention in ("additive", "dot", "general", "scaled_dot")
        for entrance in ({}, {"context_every_step": True}, {"input_feeding": True})
    ),
    {"attention": "context_as_state"},
    {"attention": "context_as_state", "context_scaling": "hidden_size"},
)
DECODERS = [
    *WITHOUT_ATTENTION,
    *(
        {**settings, "attention_direction": direction}
        for settings in WITH_ATTENTION
        for direction in ("bidirectional", "unidirectional")
    ),
]
ENCODERS = [
    {"bidirectional_encoder": False},
    {"bidirectional_encoder": False, "reverse_source": True},
    {"bidirectional_encoder": True},
    {"bidirectional_encoder": True, "encoder_layers": 1, "decoder_layers": 3},
    {"bidirectional_encoder": False, "encoder_layers": 3, "decoder_layers": 1},
]
ENDS = [
    {"tie_lm_head": True, "embedding_dim": D},
    {"share_embeddings": False, "source_vocab_size": 31, "lm_head_bias": True},
    {"tie_word_embeddings": False},
]


def label(settings):
    return "-".join(str(value) for value in settings.values())


def compare_with_loops(padding_side="right", **settings):
    """Logits, attention weights and gradients of a padded batch, against one unpadded sentence after the other."""
    model = rnn("any", **settings).build()
    batch = make_batch(padding_side=padding_side)
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    outputs = model(**batch, output_attentions=True)
    weights = dict(model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    expected_loss = count = 0
    for row in range(B):
        real = batch["attention_mask"][row].bool()
        labels = batch["labels"][row][batch["labels"][row] != -100]
        logits, attentions = rnn_logits(
            weights, model.config, batch["input_ids"][row, real].tolist(), target[row, : len(labels)].tolist()
        )
        torch.testing.assert_close(outputs.logits[row, : len(labels)], logits, rtol=0, atol=1e-9)
        assert len(attentions) == len(outputs.cross_attentions or ())
        for seen, drawn in zip(attentions, outputs.cross_attentions or (), strict=True):
            assert drawn.shape == (B, 1, T, S)
            torch.testing.assert_close(drawn[row, 0, : len(labels)][:, real], seen, rtol=0, atol=1e-9)
            assert (drawn[row, 0][:, ~real] == 0).all()
        expected_loss = expected_loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    torch.testing.assert_close(outputs.loss, expected_loss / count, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(outputs.loss, parameters.values())
    expected = torch.autograd.grad(expected_loss / count, parameters.values())
    for name, ours, theirs in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("settings", DECODERS, ids=label)
def test_decoders_equal_loops(cell, settings):
    compare_with_loops(cell=cell, **settings)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("settings", ENCODERS, ids=label)
def test_encoders_equal_loops(cell, settings):
    compare_with_loops(cell=cell, attention="none", **settings)


@pytest.mark.parametrize("settings", [*ENCODERS, *ENDS], ids=label)
def test_encoders_with_attention_and_padding_on_the_left_equal_loops(settings):
    attention = "context_as_state" if settings.keys().isdisjoint({"encoder_layers"}) else "general"
    compare_with_loops(padding_side="left", attention=attention, **settings)


# ---------------------------------------------------------------- the systems of the papers


HISTORICAL = {
    "vocab_size": 200,
    "source_vocab_size": 100,
    "embedding_dim": 50,
    "hidden_size": 64,
    "bidirectional_encoder": False,
    "share_embeddings": False,
    "tie_lm_head": False,
    "lm_head_bias": True,
    "dropout": 0.1,
}


def twins(twin_class, *sizes, **settings):
    """A plain class and our model with its weights, in float64, without dropout."""
    torch.manual_seed(0)
    twin = twin_class(100, 200, 50, 64, *sizes).double().eval()
    model = rnn("twin", **{**HISTORICAL, **settings}).build()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.copy_(theirs)
    return twin, model


def assert_equal_with_gradients(twin, model, logits, expected):
    assert logits.shape == (32, 15, 200)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad((logits * direction).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((expected * direction).sum(), list(twin.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(100, (32, 10), generator=generator), torch.randint(200, (32, 15), generator=generator)


def test_gru_twin(pairs):
    twin, model = twins(GruTwin, cell="gru", attention="none", encoder_layers=1, decoder_layers=1)
    assert_equal_with_gradients(twin, model, model(pairs[0], decoder_input_ids=pairs[1]).logits, twin(*pairs))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_edm_twin(pairs, ratio):
    twin, model = twins(EDM, 2, 0.1, attention="none")
    assert model.num_parameters() == 153_952
    logits = model(pairs[0], decoder_input_ids=pairs[1], teacher_forcing_ratio=ratio).logits
    assert_equal_with_gradients(twin, model, logits, twin(*pairs, ratio))


def test_edm_feeds_some_tokens_of_its_own(pairs):
    """Ratio 0.5 lies between: neither the one nor the other."""
    _, model = twins(EDM, 2, 0.1, attention="none")
    forced, free, half = (
        model(pairs[0], decoder_input_ids=pairs[1], teacher_forcing_ratio=ratio).logits for ratio in (1.0, 0.0, 0.5)
    )
    for other in (forced, free):
        assert torch.equal(half[:, 0], other[:, 0])
        assert not torch.allclose(half[:, 1:], other[:, 1:])


@pytest.mark.parametrize("unidirectional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_edm_twin(pairs, unidirectional, padded):
    direction = "unidirectional" if unidirectional else "bidirectional"
    twin, model = twins(AttentionEDM, 2, 0.1, attention="context_as_state", attention_direction=direction)
    assert model.num_parameters() == 157_216
    if padded:  # the twin divides by the whole source length, so only the mask is compared: same rows, all of length 7
        mask = (torch.arange(10) < 7).long().expand(32, -1)
        with torch.no_grad():
            expected = twin(pairs[0][:, :7], pairs[1], unidirectional=unidirectional)
            logits = model(pairs[0], attention_mask=mask, decoder_input_ids=pairs[1]).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    else:
        logits = model(pairs[0], decoder_input_ids=pairs[1]).logits
        assert_equal_with_gradients(twin, model, logits, twin(*pairs, unidirectional=unidirectional))


def test_equal_sizes_need_no_query_projection():
    sizes = {"attention": "context_as_state", "embedding_dim": D, "tie_lm_head": False}
    names = [name for name, _ in rnn("edm", **sizes).build().named_parameters()]
    assert not any("q_proj" in name for name in names)
    compare_with_loops(**sizes)


# ---------------------------------------------------------------- one call of torch's RNN where mathematics allows it


@pytest.mark.parametrize(("settings", "calls"), [
    ({"attention": "none"}, 1),
    ({"attention": "none", "context_every_step": True}, 1),
    ({"attention": "dot"}, 1),
    ({"attention": "dot", "input_feeding": True}, T),
    ({"attention": "dot", "context_every_step": True}, T),
    ({"attention": "context_as_state"}, T),
])  # fmt: skip
def test_fused_where_possible(settings, calls, batch):
    model = rnn("any", **settings).build()
    lengths = []
    model.model.decoder.recurrence.rnn.register_forward_hook(lambda rnn, inputs, _: lengths.append(inputs[0].shape[1]))
    model(**batch)
    assert lengths == [T // calls] * calls
    lengths.clear()
    model(**batch, teacher_forcing_ratio=0.0)
    assert lengths == [1] * T


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("settings", [*WITHOUT_ATTENTION, {"attention": "additive"}], ids=label)
def test_fused_equals_stepwise(cell, settings, batch):
    """Asking for the states of all layers steps through the target."""
    model = rnn("any", cell=cell, **settings).build()

    def result(**kwargs):
        outputs = model(**batch, **kwargs)
        return outputs.logits, torch.autograd.grad(outputs.loss, list(model.parameters()))

    fused, fused_gradients = result()
    stepwise, stepwise_gradients = result(output_hidden_states=True)
    torch.testing.assert_close(fused, stepwise, rtol=0, atol=1e-12)
    for one, other in zip(fused_gradients, stepwise_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_equals_unpacked_equals_layer_by_layer(cell, bidirectional):
    encoder = rnn("any", cell=cell, bidirectional_encoder=bidirectional, encoder_layers=3).build().get_encoder()
    ids = make_batch()["input_ids"]
    plain = encoder(ids)
    longer = torch.nn.functional.pad(ids, (0, 2), value=1)
    packed = encoder(longer, attention_mask=(torch.arange(S + 2) < S).long().expand(B, -1))
    layered = encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(packed.last_hidden_state[:, :S], plain.last_hidden_state, rtol=0, atol=1e-12)
    assert (packed.last_hidden_state[:, S:] == 0).all()
    assert torch.equal(layered.hidden_states[-1], layered.last_hidden_state)
    assert [tuple(states.shape) for states in layered.hidden_states] == [(B, S, 9), *[(B, S, D)] * 3]
    for other in (packed, layered):
        torch.testing.assert_close(other.final_state, plain.final_state, rtol=0, atol=1e-12)
    torch.testing.assert_close(layered.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-12)


def test_dropout_between_layers_in_both_ways(batch):
    """The layer-by-layer pass drops as often as torch's own call: the same mean and spread over many masks."""
    encoder = rnn("any", encoder_layers=2, dropout=0.5).build().get_encoder().train()
    ids = batch["input_ids"].repeat(400, 1)
    torch.manual_seed(0)
    fused = encoder(ids).last_hidden_state.unflatten(0, (400, B))
    layered = encoder(ids, output_hidden_states=True).last_hidden_state.unflatten(0, (400, B))
    assert (fused.mean(0) - layered.mean(0)).abs().max() < 0.06
    assert (fused.std(0) - layered.std(0)).abs().max() < 0.06
    assert fused.std(0).min() > 0.01


def test_vocabulary_sizes_are_the_right_way_round():
    model = rnn("any", share_embeddings=False, source_vocab_size=31).build()
    assert model.get_input_embeddings().weight.shape == (31, 9)
    assert model.lm_head.weight.shape == (V, D)
