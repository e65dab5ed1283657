from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from baton.engine.fusion import GatedLinears, MergedLinear, _fused, fuse_gated, merge_siblings
from baton.engine.linears import PackedLinear, can_prepack, packer, replace_linears

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_prepack(CPU, torch.float32), reason="this torch or CPU has no packed linears"
)


class Attention(nn.Module):
    def __init__(self, *, has_bias: bool = True, key_bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 24, bias=has_bias)
        self.k_proj = nn.Linear(16, 8, bias=has_bias and key_bias)
        self.v_proj = nn.Linear(16, 8, bias=has_bias)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)


class Mlp(nn.Module):
    def __init__(self, activation: str = "silu", factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, 40, bias=False)
        self.up_proj = nn.Linear(16, 40, bias=False)
        self.down_proj = nn.Linear(40, 16, bias=False)
        self.act_fn = ACT2FN[activation]
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(inputs)) * self.factor
        return self.down_proj(gate * self.up_proj(inputs))


@pytest.mark.parametrize("has_bias", [True, False])
def test_siblings_are_merged_and_compute_the_same(has_bias: bool) -> None:
    torch.manual_seed(1)
    module = Attention(has_bias=has_bias)
    one, two = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    with torch.inference_mode():
        expected = [module(one), module(two)]
        assert merge_siblings(module) == 1
        first = module.q_proj
        assert isinstance(first, MergedLinear)
        calls: list[int] = []
        first.merged.register_forward_hook(lambda *_: calls.append(1))
        for inputs, wanted in zip((one, two), expected, strict=True):
            torch.testing.assert_close(module(inputs), wanted)
        assert len(calls) == 2, "once per input"
        torch.testing.assert_close(module.v_proj(one), expected[0][2])
        torch.testing.assert_close(module.k_proj(two), expected[1][1])
        torch.testing.assert_close(module.k_proj(one), expected[0][1])
    assert sum(type(part) is nn.Linear for part in module.modules()) == 1, "the plain ones are gone"


def test_siblings_that_differ_are_left_alone() -> None:
    module = Attention(key_bias=False)
    assert merge_siblings(module) == 0
    assert type(module.q_proj) is nn.Linear


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gated_mlps_are_fused_and_compute_the_same(dtype: torch.dtype, activation: str) -> None:
    if not can_prepack(CPU, dtype):
        pytest.skip("no packed linears of this dtype")
    torch.manual_seed(2)
    module = nn.Sequential(Mlp(activation), Mlp(activation)).to(dtype)
    plain = copy.deepcopy(module)
    replace_linears(module, packer(8))
    assert fuse_gated(module, dtype) == 2
    with torch.inference_mode():
        for num_rows in (0, 1, 20):
            inputs = torch.randn(1, num_rows, 16).to(dtype)
            torch.testing.assert_close(module(inputs), plain(inputs), atol=2e-2, rtol=2e-2)


@needs_packing
def test_mlps_are_let_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(*[nn.Sequential(Mlp()) for _ in range(4)])
    replace_linears(module, packer(8))
    mlps = [weakref.ref(layer[0]) for layer in module]
    alive: list[int] = []

    def count(child: nn.Module) -> nn.Module | None:
        alive.append(sum(mlp() is not None for mlp in mlps))
        return _fused(child)

    monkeypatch.setattr("baton.engine.fusion._fused", count)
    assert fuse_gated(module, torch.float32) == 4
    assert alive == [4, 3, 2, 1]


@needs_packing
def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    module = nn.Sequential(Mlp(factor=1.5))
    replace_linears(module, packer(8))
    assert fuse_gated(module, torch.float32) == 0
    assert isinstance(module[0], Mlp)
    assert isinstance(module[0].gate_proj, PackedLinear)


@needs_packing
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_other_activations_are_left_alone(activation: str) -> None:
    module = nn.Sequential(Mlp(activation))
    replace_linears(module, packer(8))
    assert fuse_gated(module, torch.float32) == 0
    assert not isinstance(module[0], GatedLinears)
