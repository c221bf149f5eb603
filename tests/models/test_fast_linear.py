"""Products laid side by side and computed by oneDNN, against the layers called one after another."""

import pytest
import torch
from torch import nn

from conftest import FAMILIES, D, make_batch
from dragoman.models import fast_linear


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that oneDNN multiplied with."""
    shapes, inner = [], fast_linear.onednn_linear

    def spy(x, weight, bias):
        shapes.append(tuple(weight.shape))
        return inner(x, weight, bias)

    monkeypatch.setattr(fast_linear, "onednn_linear", spy)
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


@torch.no_grad()
def test_inside_linear_layers_are_onednns(products):
    layer, x = nn.Linear(D, 5), torch.randn(2, 3, D)
    expected = layer(x)
    with fast_linear.ByOneDNN():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(nn.functional.linear(x, layer.weight) + layer.bias, expected, rtol=0, atol=1e-6)
        layer.double()(x.double())  # a dtype that PyTorch keeps
    assert products == [(5, D)] * 2


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"penalty_alpha": 0.6}], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tokens_do_not_depend_on_who_multiplies(family, products, settings, monkeypatch):
    model = family.build(dtype=torch.float32)
    batch = make_batch()
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **settings}
    fast = model.generate(**arguments)
    assert products or not family.is_transformer
    products.clear()
    monkeypatch.setattr(fast_linear, "suits_onednn", lambda weight: False)
    assert torch.equal(model.generate(**arguments), fast)
    assert products == []
