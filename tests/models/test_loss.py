"""The loss that makes no logits against the plain one: numbers and gradients, over every head and both families."""

import pytest
import torch
from torch import nn

from conftest import PAD, B, D, T, V, family, make_batch
from dragoman.models import loss
from dragoman.models.loss import next_token_loss, next_token_loss_of_states


@pytest.fixture(params=[1, 2, 100], ids=lambda rows: f"{rows} rows at a time")
def rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", request.param * V)
    monkeypatch.setattr(loss, "FEWEST_ROWS_AT_A_TIME", 1)


def losses_and_gradients(model, batch, **kwargs):
    """The loss and every gradient by name, of one forward and backward pass in training mode."""
    model.zero_grad()
    outputs = model.train()(**batch, **kwargs)
    (3 * outputs.loss).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return outputs, gradients


@pytest.mark.parametrize("settings", [
    {}, {"label_smoothing": 0.3}, {"tie_lm_head": False, "lm_head_bias": True, "label_smoothing": 0.1},
])  # fmt: skip
def test_the_lean_loss_equals_the_plain_one(any_family, batch, settings, rows_at_a_time):
    model = any_family.build(**{**any_family.settings, **settings})
    for count in (11, torch.tensor(7)):
        lean, lean_gradients = losses_and_gradients(model, batch, num_items_in_batch=count)
        plain, gradients = losses_and_gradients(model, batch, num_items_in_batch=count, output_logits=True)
        assert lean.logits is None
        assert plain.logits.shape == (B, T, V)
        torch.testing.assert_close(lean.loss, plain.loss, rtol=1e-12, atol=0)
        assert lean_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_logits_are_left_out_only_where_a_trainer_optimizes(model, batch):
    assert model.train()(**batch).logits is not None
    assert model(**batch, output_logits=False).logits is None
    assert model(**batch, num_items_in_batch=3, output_logits=True).logits is not None
    assert model(input_ids=batch["input_ids"], decoder_input_ids=batch["labels"].clamp(min=PAD)).logits is not None
    assert model(**batch, num_items_in_batch=3).logits is None
    assert model.eval()(**batch, num_items_in_batch=3).logits is not None


class Scaled(nn.Linear):
    """A head that is more than a linear layer."""

    def forward(self, states):
        return super().forward(states) * 2


class Adapted(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.adapter = head, nn.Linear(D, V, bias=False).double()

    def forward(self, states):
        return self.head(states) + self.adapter(states)


def hooked():
    head = nn.Linear(D, V)
    head.register_forward_hook(lambda module, inputs, outputs: outputs * 2)
    return head


@pytest.mark.parametrize("head", [nn.Linear(D, V), Scaled(D, V), Adapted(nn.Linear(D, V)), hooked()])
def test_other_heads_are_called(head, batch, rows_at_a_time):
    """A head with an adapter, a hook or a forward of its own is called and not seen through."""
    head = head.double()
    found = []
    for lean in (True, False):
        states = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        states.requires_grad_()
        head.zero_grad()
        if lean:
            value = next_token_loss_of_states(states, head, batch["labels"], V, 0.1)
        else:
            value = next_token_loss(head(states), batch["labels"], 0.1)
        value.backward()
        found.append((value.detach(), states.grad, *(parameter.grad.clone() for parameter in head.parameters())))
    for lean, plain in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero3", [False, True])
def test_zero3_calls_the_head_once_in_every_process(batch, monkeypatch, zero3):
    """Its weights are gathered for each call, for which all processes wait; also where one has no target at all."""
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", 4 * V)
    monkeypatch.setattr(loss, "FEWEST_ROWS_AT_A_TIME", 1)
    monkeypatch.setattr(loss, "is_deepspeed_zero3_enabled", lambda: zero3)
    head, calls = nn.Linear(D, V).double(), []
    head.register_forward_hook(lambda module, inputs, outputs: calls.append(len(outputs)))
    states = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for labels, chunks in ((batch["labels"], [4, 4, 4]), (torch.full((B, T), -100), [0])):
        calls.clear()
        with torch.no_grad():
            value = next_token_loss_of_states(states, head, labels, V, num_items_in_batch=9)
        assert calls == ([sum(chunks)] if zero3 else chunks)
        torch.testing.assert_close(value, next_token_loss(head(states), labels, 0.0, 9), rtol=1e-9, atol=1e-12)


def test_frozen_heads_and_states(batch):
    head = nn.Linear(D, V).double().requires_grad_(False)
    states = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    next_token_loss_of_states(states, head, batch["labels"], V).backward()
    (expected,) = torch.autograd.grad(next_token_loss(head(states), batch["labels"]), states)
    torch.testing.assert_close(states.grad, expected)
    assert head.weight.grad is None
    with torch.no_grad():
        value = next_token_loss_of_states(states, head, batch["labels"], V)
    torch.testing.assert_close(value, next_token_loss(head(states), batch["labels"]))


def test_backward_twice_adds_up(batch):
    head, states = nn.Linear(D, V).double(), torch.randn(B, T, D, dtype=torch.float64)
    value = next_token_loss_of_states(states, head, batch["labels"], V)
    value.backward(retain_graph=True)
    once = head.weight.grad.clone()
    value.backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


def test_the_lean_loss_has_no_second_derivative(batch):
    """Its gradients are numbers by then: better an error than a wrong one."""
    head, states = nn.Linear(D, V), torch.randn(B, T, D, requires_grad=True)
    value = next_token_loss_of_states(states, head, batch["labels"], V)
    (gradient,) = torch.autograd.grad(value**2, states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_half_precision_sums_in_single(rows_at_a_time):
    """Under autocast and with weights in bfloat16: as near to single precision as bfloat16's products allow."""
    torch.manual_seed(0)
    model = family("2017").build(dtype=torch.float32, label_smoothing=0.1)
    batch = make_batch()
    exact, exact_gradients = losses_and_gradients(model, batch, num_items_in_batch=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_gradients = losses_and_gradients(model, batch, num_items_in_batch=9)
    half, half_gradients = losses_and_gradients(model.bfloat16(), batch, num_items_in_batch=9)
    for outputs, gradients in ((mixed, mixed_gradients), (half, half_gradients)):
        assert outputs.loss.dtype == torch.float32
        torch.testing.assert_close(outputs.loss, exact.loss, rtol=0.02, atol=0)
        name = "model.encoder.embed_tokens.weight"
        error = (gradients[name].float() - exact_gradients[name]).norm() / exact_gradients[name].norm()
        assert error < 0.05


def test_only_real_targets_meet_the_vocabulary(batch, monkeypatch):
    """The logits made are (real targets, V), never (B, T, V), and never more than a chunk."""
    sizes = []
    original = torch.Tensor.amax
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", 4 * V)
    monkeypatch.setattr(loss, "FEWEST_ROWS_AT_A_TIME", 1)

    def amax(self, *args, **kwargs):
        sizes.append(tuple(self.shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "amax", amax)
    losses_and_gradients(family("modern").build(), batch, num_items_in_batch=9)
    assert sizes == [(4, V), (4, V), (4, V)]  # targets of 5, 4 and 3 tokens
