"""Linear layers at the speed of the machine: multiplied by oneDNN, and while `generate` runs laid side by side."""

import functools
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


# PyTorch hands single-precision products on the CPU to MKL, which oneDNN outruns about twice on x86 processors that are
# not Intel's. `torch.ops.mkldnn` has what `torch.compile` calls there; it knows no gradients, so they are written here.
# Weights in the order in which oneDNN reads them are a second copy of the decoder's while it decodes: up to this size.
PACKED_BYTES = 2**30
# The first product of a shape costs oneDNN half a millisecond more. Below so many multiplications PyTorch is as good.
FEWEST_MULTIPLICATIONS = 2**21
# Every new shape leaves about 0.7 MB of machine code in the caches of oneDNN and of PyTorch's bridge to it, which keep
# 1,024 each unless told otherwise. Batches have ever new shapes, and memory would grow for hours. Both read this at the
# first product of the process.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an x86 processor that MKL does not know how to use, and PyTorch was built with both."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    information = Path("/proc/cpuinfo")
    names = information.read_text(encoding="utf-8") if information.is_file() else platform.processor()
    return "AuthenticAMD" in names


def suits_onednn(*tensors: torch.Tensor) -> bool:
    return bool(
        all(
            type(tensor) in (torch.Tensor, nn.Parameter)  # no other library's tensor, which may be a part of one
            and tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            for tensor in tensors
        )
        and torch.backends.mkldnn.enabled
        and onednn_is_faster()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` without gradients, with a weight as it is stored or packed."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """`nn.functional.linear` (N, K), (M, K), (M) or None -> (N, M); its gradients are such products again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(grad.t(), x.t()) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear`, gradients of any order included, by whichever library is faster: (..., K) -> (..., M)."""
    if torch.compiler.is_compiling():  # which would take the number of rows for a constant
        return nn.functional.linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if rows * weight.numel() < FEWEST_MULTIPLICATIONS or weight.ndim != 2 or not suits_onednn(*tensors):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        outputs = _OneDNNLinear.apply(x.reshape(rows, x.shape[-1]), weight, bias)
        return outputs.view(*x.shape[:-1], weight.shape[0])
    return onednn_linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, which computes as `linear` does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def is_plain(layer: Any) -> bool:
    """Whether the layer does what `nn.Linear` does, with a weight of its own that can be used without calling it."""
    forward = type(layer).forward in (nn.Linear.forward, Linear.forward) and "forward" not in vars(layer)
    return forward and type(layer.weight) in (torch.Tensor, nn.Parameter)


def side_by_side(layers: Sequence[Any], pack: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    One product in place of several with the same input: a function (..., D) -> (..., sum of the outputs' widths). It
    holds a copy of the weights as they are now, unless there is one layer only and `pack` is false.

    Args:
        layers: linear layers; those of other libraries (quantized, adapted) are called as they are.
        pack: keep the copy in the order in which oneDNN reads it, where that is what multiplies.
    """
    if not all(is_plain(layer) for layer in layers):
        return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weight = weights[0] if len(layers) == 1 else torch.cat(weights)
    bias = biases[0] if len(layers) == 1 or biases[0] is None else torch.cat(biases)
    if suits_onednn(weight):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight) if pack else weight
        return lambda x: onednn_linear(x, weight, bias)
    return lambda x: nn.functional.linear(x, weight, bias)
