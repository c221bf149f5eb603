"""Linear layers at the speed of the machine while `generate` runs: laid side by side, and multiplied by oneDNN."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


# PyTorch hands single-precision products on the CPU to MKL, which oneDNN outruns about twice on CPUs that are not
# Intel's. `torch.ops.mkldnn` has what `torch.compile` calls there; it knows no gradients.
# Weights in the order in which oneDNN reads them are a second copy of the decoder's while it decodes: up to this size.
PACKED_BYTES = 2**30


def suits_onednn(weight: torch.Tensor) -> bool:
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
    )


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`nn.functional.linear`, with a weight as it is stored or packed."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class ByOneDNN(TorchFunctionMode):
    """Inside, every `nn.functional.linear` of single precision on the CPU is oneDNN's; without gradients."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs and suits_onednn(args[1]) and type(args[0]) is torch.Tensor:
            return onednn_linear(args[0], args[1], args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))


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


def is_plain(layer: Any) -> bool:
    """Whether the layer does what `nn.Linear` does, with weights that can be laid beside others."""
    return type(layer).forward is nn.Linear.forward and type(layer.weight) in (torch.Tensor, nn.Parameter)
