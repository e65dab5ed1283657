"""Linear layers with weights laid out for their kernel: up to 3 times faster for few rows on CPU.

The kernel is ours (kernels.py) where there is one for the CPU and the dtype, else oneDNN's, whose
operators are those that torch.compile emits when it freezes a model. They are private, so
nothing else knows of them, and where they are missing the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from baton.engine.kernels import Product, can_multiply

LinearFactory = Callable[[nn.Linear], nn.Module | None]
"""Makes what replaces a plain linear layer; None leaves it as it is."""

_DTYPES = frozenset({torch.float32, torch.bfloat16})


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have oneDNN's operators for a dtype."""
    if device.type != "cpu" or dtype not in _DTYPES or not _has_onednn():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


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

    Each plain weight is let go as soon as its layer is replaced, so that there is never a second
    copy of the model; but for weights that an embedding shares, which stay beside the new layer.

    Returns:
        Layers replaced.
    """
    num_replaced = 0
    with torch.no_grad():
        # Not the layers themselves, which such a list would hold on to.
        for parent in [part for part in module.modules() if type(part) is not nn.Linear]:
            for name, child in list(parent.named_children()):
                # Subclasses compute something else.
                if type(child) is not nn.Linear:
                    continue
                replacement = factory(child)
                if replacement is not None:
                    setattr(parent, name, replacement)
                    num_replaced += 1
    return num_replaced
