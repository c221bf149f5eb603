"""What every model of every family must do in one forward or backward pass."""

import pytest
import torch

import reference
from conftest import EOS, PAD, B, D, S, T, V, make_batch


def real(labels):
    return labels != -100


def decoder_inputs(model, labels):
    return model.prepare_decoder_input_ids_from_labels(labels)


def test_shapes(any_family, batch):
    outputs = any_family.build()(**batch, output_hidden_states=True)
    assert outputs.logits.shape == (B, T, V)
    assert outputs.encoder_last_hidden_state.shape[:2] == (B, S)
    assert outputs.decoder_hidden_states[-1].shape == (B, T, D)
    assert outputs.loss.shape == ()


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_changes_nothing(model, padding_side):
    batch = make_batch(padding_side=padding_side)
    padded = model(**batch).logits
    for row in range(B):
        source = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
        labels = batch["labels"][row : row + 1, real(batch["labels"][row])]
        alone = model(input_ids=source, labels=labels).logits[0]
        torch.testing.assert_close(padded[row, : len(alone)], alone, rtol=0, atol=1e-12)


def test_batch_order_changes_nothing(model, batch):
    order = torch.tensor([2, 0, 1])
    logits = model(**batch).logits
    permuted = model(**{name: value[order] for name, value in batch.items()}).logits
    torch.testing.assert_close(permuted, logits[order], rtol=0, atol=1e-12)


def test_left_padded_targets_change_nothing(any_family, batch):
    model = any_family.build()
    target = decoder_inputs(model, batch["labels"])[:1]
    source = batch["input_ids"][:1]
    alone = model(input_ids=source, decoder_input_ids=target).logits
    padded = torch.cat((torch.full((1, 2), PAD), target), dim=1)
    mask = torch.tensor([[0, 0] + [1] * T])
    if not any_family.is_transformer:
        with pytest.raises(ValueError, match="decoder_attention_mask"):
            model(input_ids=source, decoder_input_ids=padded, decoder_attention_mask=mask)
        return
    logits = model(input_ids=source, decoder_input_ids=padded, decoder_attention_mask=mask).logits
    torch.testing.assert_close(logits[:, 2:], alone, rtol=0, atol=1e-12)


def test_no_look_ahead(model, batch):
    target = decoder_inputs(model, batch["labels"])
    logits = model(input_ids=batch["input_ids"], decoder_input_ids=target).logits
    for t in range(1, T):
        changed = target.clone()
        changed[:, t:] = (changed[:, t:] + 5) % V
        other = model(input_ids=batch["input_ids"], decoder_input_ids=changed).logits
        assert torch.equal(logits[:, :t], other[:, :t])
        assert not torch.allclose(logits[:, t:], other[:, t:])


def test_the_source_counts(model, batch):
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 1] = (changed["input_ids"][:, 1] + 5) % V
    before, after = model(**batch).logits, model(**changed).logits
    assert (before - after).abs().amax(dim=(1, 2)).min() > 1e-9


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_loss_is_the_formula(any_family, batch, label_smoothing):
    model = any_family.build(label_smoothing=label_smoothing).train()
    outputs = model(**batch)
    expected = reference.next_token_loss(outputs.logits, batch["labels"], label_smoothing)
    torch.testing.assert_close(outputs.loss, expected)
    unsmoothed = reference.next_token_loss(outputs.logits, batch["labels"])
    torch.testing.assert_close(model.eval()(**batch).loss, unsmoothed)


def test_both_conventions_of_the_loss(model):
    """Decoder inputs shifted right; and the whole target fed, logits and targets cut by one."""
    batch = make_batch()
    labels = batch["labels"][:1]  # the one without padding
    shifted = model(input_ids=batch["input_ids"][:1], labels=labels).loss
    whole = torch.cat((torch.tensor([[model.config.decoder_start_token_id]]), labels), dim=1)
    logits = model(input_ids=batch["input_ids"][:1], decoder_input_ids=whole).logits
    cut = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), whole[:, 1:].flatten())
    torch.testing.assert_close(shifted, cut, rtol=0, atol=1e-12)


def test_micro_batches_add_up(any_family):
    """One batch of 8, and two micro-batches of 4 with the number of labels of both: same loss, same gradients."""
    batch = make_batch(rows=8)
    count = real(batch["labels"]).sum()

    def gradients(parts):
        model = any_family.build()
        losses = []
        for part in parts:
            loss = model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=count).loss
            loss.backward()
            losses.append(loss.detach())
        return sum(losses), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    one_loss, one = gradients([slice(0, 8)])
    two_loss, two = gradients([slice(0, 4), slice(4, 8)])
    plain = any_family.build()(**batch).loss
    torch.testing.assert_close(one_loss, plain.detach())
    torch.testing.assert_close(one_loss, two_loss)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_every_parameter_learns(any_family, batch):
    model = any_family.build().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    if any_family.is_transformer and model.config.position_embedding_type != "rotary":
        # A bias on all keys adds the same to every score of a row, which the softmax takes away again. What is left
        # is rounding error, so these may move or not.
        still = {name for name in still if not name.endswith("k_proj.bias")}
    assert not still


def test_labels_or_decoder_inputs_are_needed(model, batch):
    with pytest.raises(ValueError, match="decoder has no input: give labels, or decoder_input_ids"):
        model(input_ids=batch["input_ids"])


def test_without_labels_there_is_nothing_to_lose(model, batch):
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for count in (None, 0, torch.tensor(0)):
        assert model(**nothing, num_items_in_batch=count).loss == 0


def test_the_count_of_labels_may_be_a_number(model, batch):
    count = (batch["labels"] != -100).sum()
    assert model(**batch, num_items_in_batch=int(count)).loss == model(**batch, num_items_in_batch=count).loss


@pytest.mark.parametrize("name", ["pad_token_id", "decoder_start_token_id"])
def test_labels_need_the_ids_around_them(any_family, batch, name):
    model = any_family.build()
    setattr(model.config, name, None)
    with pytest.raises(ValueError, match=f"the config has {name}=None"):
        model(**batch)


def test_logits_to_keep(model, batch):
    target = decoder_inputs(model, batch["labels"])
    every = model(input_ids=batch["input_ids"], decoder_input_ids=target).logits
    last = model(input_ids=batch["input_ids"], decoder_input_ids=target, logits_to_keep=2).logits
    assert last.shape == (B, 2, V)
    torch.testing.assert_close(last, every[:, -2:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="logits_to_keep leaves out logits that the loss of labels needs"):
        model(**batch, logits_to_keep=2)


def test_encoder_outputs_can_be_reused(model, batch):
    encoder_outputs = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    again = model(encoder_outputs=encoder_outputs, attention_mask=batch["attention_mask"], labels=batch["labels"])
    as_tuple = model(
        encoder_outputs=encoder_outputs.to_tuple(), attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    expected = model(**batch).logits
    torch.testing.assert_close(again.logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(as_tuple.logits, expected, rtol=0, atol=1e-12)


def test_embeddings_can_replace_ids(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    outputs = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(outputs.logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_a_source_of_nothing_stays_finite(model, batch):
    batch["attention_mask"][1] = 0
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_it_learns(any_family):
    """A handful of pairs is learned by heart."""
    model = any_family.build(dtype=torch.float32).train()
    batch = make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = model(**batch).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 10
    generated = model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=1)
    for row in range(B):
        wanted = batch["labels"][row, real(batch["labels"][row])]
        assert generated[row, 1 : 1 + len(wanted)].tolist() == wanted.tolist()
        assert wanted[-1] == EOS
