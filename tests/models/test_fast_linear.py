"""Products computed by oneDNN, and laid side by side, against PyTorch's own and one after another."""

import pytest
import torch
from torch import nn

from conftest import FAMILIES, D, make_batch
from dragoman.models import fast_linear


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that oneDNN multiplied with, on any processor and however small."""
    shapes, inner = [], fast_linear.onednn_linear

    def spy(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return inner(x, weight, bias)

    monkeypatch.setattr(fast_linear, "onednn_linear", spy)
    monkeypatch.setattr(fast_linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(fast_linear, "FEWEST_MULTIPLICATIONS", 1)
    return shapes


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(5,), (5, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_side_by_side_equals_one_after_another(products, dtype, widths, bias, pack):
    torch.manual_seed(0)
    layers = [nn.Linear(D, width, bias=bias, dtype=dtype) for width in widths]
    together = fast_linear.side_by_side(layers, pack)
    for shape in ((7, D), (2, 3, D), (1, 1, D)):
        x = torch.randn(shape, dtype=dtype)
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(together(x), expected, rtol=0, atol=tolerance)
    assert products == ([(sum(widths), D)] * 3 if dtype == torch.float32 else [])


class Doubled(nn.Linear):
    """A layer as adapters and quantization make them: `weight` is not what it multiplies with."""

    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_layers_with_a_forward_of_their_own_are_called(products):
    layers = [nn.Linear(D, 5), Doubled(D, 3)]
    x = torch.randn(4, D)
    expected = torch.cat([layers[0](x), 2 * nn.functional.linear(x, layers[1].weight, layers[1].bias)], dim=-1)
    torch.testing.assert_close(fast_linear.side_by_side(layers, True)(x), expected)
    torch.testing.assert_close(fast_linear.side_by_side(layers[1:], True)(x), expected[:, 5:])
    assert products == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (1, 1, D), (0, D), (2, 0, D), (D,)], ids=str)
def test_outputs_and_gradients_are_pytorchs(products, shape, bias):
    torch.manual_seed(0)
    layer = fast_linear.Linear(D, 5, bias=bias)
    tensors = [torch.randn(shape, requires_grad=True), *layer.parameters()]

    def found(linear):
        outputs = linear(*tensors)
        gradients = torch.autograd.grad(outputs, tensors, outputs.detach().cos(), create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in gradients), tensors[:2])
        return [outputs, *gradients, *second]

    expected = found(nn.functional.linear)
    assert products == []
    for one, other in zip(found(lambda x, *_: layer(x)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The last two: each gradient by the other tensor.
    assert len(products) == (0 if 0 in shape else 3 + 2)


def test_inputs_that_do_not_lie_in_one_piece(products):
    layer = fast_linear.Linear(D, 5)
    for x in (torch.randn(D, 7).t(), torch.randn(2, 1, D).expand(2, 3, D), torch.randn(3, 2, D).transpose(0, 1)):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-6)
    assert products == [(5, D)] * 3


def test_what_is_not_onednns_is_pytorchs(products, monkeypatch):
    layer, x = fast_linear.Linear(D, 5), torch.randn(2, 3, D)
    per_row = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x.flatten(0, 1))
    torch.testing.assert_close(per_row, 2 * layer(x).flatten(0, 1) @ layer.weight)
    products.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    torch.jit.trace(layer, x, check_trace=False)
    layer.double()(x.double())
    monkeypatch.setattr(fast_linear, "FEWEST_MULTIPLICATIONS", 2 * 3 * 5 * D + 1)
    layer.float()(x)
    assert products == []
    layer(torch.randn(7, D))
    assert products == [(5, D)]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"penalty_alpha": 0.6}], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tokens_do_not_depend_on_who_multiplies(family, products, settings, monkeypatch):
    model = family.build(dtype=torch.float32)
    batch = make_batch()
    monkeypatch.setattr(fast_linear, "FEWEST_MULTIPLICATIONS", 1)
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **settings}
    fast = model.generate(**arguments)
    assert products or not family.is_transformer
    products.clear()
    monkeypatch.setattr(fast_linear, "suits_onednn", lambda *tensors: False)
    assert torch.equal(model.generate(**arguments), fast)
    assert products == []
