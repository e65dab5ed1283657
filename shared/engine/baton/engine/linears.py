"""Linear layers with weights laid out for their kernel: up to 3 times faster for few rows on CPU.

The kernel is ours (kernels.py) where there is one for the CPU and the dtype, else oneDNN's, whose
operators are those that torch.compile emits when it freezes a model. They are private, so
nothing else knows of them, and where they are missing the layers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from baton.engine.kernels import Product, can_multiply

logger = logging.getLogger(__name__)

LinearFactory = Callable[[nn.Linear], nn.Module | None]
"""Makes what replaces a plain linear layer; None leaves it as it is."""

_DTYPES = frozenset({torch.float32, torch.bfloat16})


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have oneDNN's operators for a dtype."""
    is_there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if device.type != "cpu" or dtype not in _DTYPES or not is_there:
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class KernelLinear(nn.Module):
    """Computes what the layer that its `product` was made from does."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.in_features = product.in_features
        self.out_features = product.out_features
        self.product = product

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.product(inputs)


class PackedLinear(nn.Module):
    """Computes what the `linear` that it was made from does, by oneDNN."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        # Looking these up takes as long as a small layer.
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_binary = torch.ops.mkldnn._linear_pointwise.binary

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.activated(inputs, "none", "")

    def activated(self, inputs: torch.Tensor, activation: str, algorithm: str) -> torch.Tensor:
        """`forward`, and one of oneDNN's activations on the sums before they are rounded."""
        if not inputs.numel():
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        output: torch.Tensor = self._linear(
            inputs, self._packed, self.bias, activation, [], algorithm
        )
        return output

    def multiplied(self, inputs: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`forward` times `factor` [..., out_features], multiplied before rounding."""
        if not inputs.numel():
            return factor
        output: torch.Tensor = self._linear_binary(inputs, factor, self._packed, self.bias, "mul")
        return output


def packer(num_rows: int) -> LinearFactory:
    """A factory of layers packed for batches of `num_rows`; it skips what cannot be packed."""

    def pack(linear: nn.Linear) -> nn.Module | None:
        if can_multiply(linear.weight, linear.weight.dtype):
            return KernelLinear(Product([(linear.weight.detach(), None, linear.bias)]))
        if not can_prepack(linear.weight.device, linear.weight.dtype):
            return None
        return PackedLinear(linear, num_rows)

    return pack


def replace_linears(module: nn.Module, factory: LinearFactory) -> int:
    """Replaces the plain linear layers of a model in place.

    Each plain weight is freed as soon as its layer is replaced, so there is never a second copy of
    the model. A weight that an embedding shares stays in memory beside the new layer.

    Returns:
        Layers replaced.
    """
    # Subclasses compute something else.
    return replace_layers(module, lambda layer: type(layer) is nn.Linear, factory)


def replace_layers(
    module: nn.Module,
    is_wanted: Callable[[nn.Module], bool],
    make: Callable[[Any], nn.Module | None],
    is_same: Callable[[Any, Any], bool] | None = None,
) -> int:
    """Replaces layers of a model in place by what `make` makes of them; None leaves one alone.

    `is_same` compares the first layer of each class with what would replace it; a class that
    computes something else is left alone.

    Returns:
        Layers replaced.
    """
    verdicts: dict[type[nn.Module], bool] = {}
    num_replaced = 0
    with torch.no_grad():
        # Their names only: a list of layers would hold on to weights that were replaced.
        names = [name for name, layer in module.named_modules() if name and is_wanted(layer)]
        for name in names:
            layer = module.get_submodule(name)
            made, kind = make(layer), type(layer)
            if made is None:
                continue
            if is_same is not None and kind not in verdicts:
                verdicts[kind] = is_same(layer, made)
                if not verdicts[kind]:
                    logger.info("%s computes more than its faster form: left alone", kind.__name__)
            if verdicts.get(kind, True):
                module.set_submodule(name, made)
                num_replaced += 1
    return num_replaced
