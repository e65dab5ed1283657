"""Fewer and larger operators in models whose layers are put together in the usual way.

Layers are found by the names of their parts and checked by what they compute. What looks different,
or turns out to compute something else, stays as transformers wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from baton.engine.kernels import Product
from baton.engine.linears import KernelLinear, PackedLinear, replace_layers
from baton.engine.pages import LargePages, give_back_free_memory

logger = logging.getLogger(__name__)

SIBLINGS = (("q_proj", "k_proj", "v_proj"),)
"""Layers that read the same input."""
_GATED = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
"""By the class of the activation."""
_ONEDNN_ACTIVATIONS = {"silu": ("swish", ""), "gelu_tanh": ("gelu", "tanh")}
"""oneDNN's name and algorithm."""
_MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of a rewritten layer."""


class MergedLinear(nn.Module):
    """The first of some sibling layers: computes all of them at once, and keeps the others' parts.

    `merged` is a linear layer of `sizes` outputs one after the other, open to be packed.
    """

    def __init__(self, merged: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.merged = merged
        # In lists: nn.Module.__setattr__ is slow.
        self._inputs: list[torch.Tensor] = []
        self._parts: list[torch.Tensor | None] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The first sibling's output."""
        return self.part(0, inputs)

    def part(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """A sibling's output. Each is computed once as long as the input stays the same tensor."""
        if not self._inputs or self._inputs[0] is not inputs or self._parts[index] is None:
            self._inputs[:] = [inputs]
            self._parts[:] = self.merged(inputs).split(self.sizes, -1)
        part = cast("torch.Tensor", self._parts[index])
        self._parts[index] = None
        if index == len(self.sizes) - 1:
            self._inputs.clear()
            self._parts.clear()
        return part


class SiblingLinear(nn.Module):
    """Another of the siblings: takes its part from the first."""

    def __init__(self, first: MergedLinear, index: int) -> None:
        super().__init__()
        # In a tuple, so that it is not registered as a part of this one as well.
        self._first = (first,)
        self._index = index

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """This sibling's output."""
        return self._first[0].part(self._index, inputs)


class GatedLinears(nn.Module):
    """down(activation(gate(x)) * up(x)) with the activation and the product inside the layers."""

    def __init__(self, parts: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj = cast("PackedLinear", parts.gate_proj)
        self.up_proj = cast("PackedLinear", parts.up_proj)
        self.down_proj = cast("PackedLinear", parts.down_proj)
        self._activation, self._algorithm = _ONEDNN_ACTIVATIONS[activation]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        gate = self.gate_proj.activated(inputs, self._activation, self._algorithm)
        return self.down_proj(self.up_proj.multiplied(inputs, gate))  # type: ignore[no-any-return]


def merge_siblings(module: nn.Module, siblings_names: Sequence[tuple[str, ...]] = SIBLINGS) -> int:
    """Merges query, key and value layers in place, before they are packed or quantized.

    Returns:
        Groups merged.
    """
    num_merged = 0
    with torch.no_grad():
        for parent in list(module.modules()):
            for names in siblings_names:
                found = [getattr(parent, name, None) for name in names]
                siblings = [part for part in found if type(part) is nn.Linear]
                if len(siblings) < len(names) or not _are_alike(siblings):
                    continue
                sizes = [sibling.out_features for sibling in siblings]
                place_siblings(parent, names, _concatenated(siblings), sizes)
                num_merged += 1
    if not num_merged:
        logger.debug("no query, key and value layers to merge in %s", type(module).__name__)
    return num_merged


def place_siblings(
    module: nn.Module, names: Sequence[str], merged: nn.Module, sizes: list[int]
) -> None:
    """Has sibling layers, by their paths in `module`, computed by one layer."""
    first = MergedLinear(merged, sizes)
    for index, name in enumerate(names):
        module.set_submodule(name, SiblingLinear(first, index) if index else first)


def fuse_gated(module: nn.Module, dtype: torch.dtype) -> int:
    """Puts activations and products into the packed layers of gated MLPs, in place.

    Each class of MLP is tried once on random input, and left alone if the output differs.

    Returns:
        MLPs replaced.
    """
    return replace_layers(module, _is_gated, _fused, lambda mlp, fused: _is_same(mlp, fused, dtype))


def _is_gated(module: nn.Module) -> bool:
    return dict(module.named_children()).keys() == _GATED


def _fused(module: nn.Module) -> nn.Module | None:
    parts: dict[str, Any] = dict(module.named_children())
    activation = _ACTIVATIONS.get(type(parts.pop("act_fn")).__name__)
    if activation is None:
        return None
    if all(type(part) is PackedLinear for part in parts.values()):
        return GatedLinears(module, activation)
    products = _gate_products(parts["gate_proj"], parts["up_proj"])
    if not products:
        return None
    gated = Product([part for product in products for part in product.parts], activation)
    return nn.Sequential(KernelLinear(gated), parts["down_proj"])


def _gate_products(gate: nn.Module, up: nn.Module) -> list[Product]:
    """Those of our kernels that compute gate and up; none where something else does."""
    parts = [gate.merged] if isinstance(gate, MergedLinear) else [gate, up]
    products = [getattr(part, "product", None) for part in parts]
    return [product for product in products if product] if all(products) else []


def _is_same(module: nn.Module, fused: nn.Module, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    first: Any = next(fused.children())
    inputs = torch.randn(1, 3, first.in_features, generator=generator).to(dtype)
    expected = module(inputs)
    if not isinstance(expected, torch.Tensor):
        return False
    difference = (fused(inputs).float() - expected.float()).norm()
    return bool(difference <= _MAX_ERROR[dtype] * expected.float().norm())


def pack_products(module: nn.Module) -> int:
    """Packs the weights that our kernels multiply with, after all merging.

    Returns:
        Products packed.
    """
    pages = LargePages()
    found = [getattr(part, "product", None) for part in module.modules()]
    products = [product for product in found if isinstance(product, Product)]
    for product in products:
        product.pack(pages)
    give_back_free_memory()
    return len(products)


def _are_alike(siblings: list[nn.Linear]) -> bool:
    first = siblings[0].weight
    return all(
        sibling.weight.shape[1] == first.shape[1]
        and sibling.weight.dtype == first.dtype
        and sibling.weight.device == first.device
        and (sibling.bias is None) == (siblings[0].bias is None)
        for sibling in siblings
    )


def _concatenated(siblings: list[nn.Linear]) -> nn.Linear:
    weight = torch.cat([sibling.weight for sibling in siblings])
    # Without storage: its parameters are set right below.
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if siblings[0].bias is not None:
        bias = torch.cat([sibling.bias for sibling in siblings])
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged
