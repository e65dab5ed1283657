from __future__ import annotations

import pytest
import torch
from torch import nn

from baton.engine import linears
from baton.engine.linears import PackedLinear, can_prepack, packer, replace_linears

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_prepack(CPU, torch.float32), reason="this torch or CPU has no packed linears"
)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 100])
def test_packed_layers_compute_the_same(dtype: torch.dtype, has_bias: bool, num_rows: int) -> None:
    if not can_prepack(CPU, dtype):
        pytest.skip("no packed linears of this dtype")
    torch.manual_seed(1)
    linear = nn.Linear(48, 96, bias=has_bias).to(dtype)
    inputs = torch.randn(1, num_rows, 48).to(dtype)
    with torch.inference_mode():
        packed = PackedLinear(linear, 8)(inputs)
        torch.testing.assert_close(packed, linear(inputs), atol=1e-2, rtol=1e-2)


@needs_packing
def test_all_plain_linears_of_a_model_are_replaced() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), Special(8, 8)))
    inputs = torch.randn(3, 4)
    with torch.inference_mode():
        expected = model(inputs)
        assert replace_linears(model, packer(8)) == 2
        torch.testing.assert_close(model(inputs), expected)
    assert isinstance(model[0], PackedLinear)
    assert isinstance(model[1][1], Special)


def test_without_the_operators_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "can_prepack", lambda *_: False)
    model = nn.Sequential(nn.Linear(4, 4))
    assert replace_linears(model, packer(8)) == 0
    assert type(model[0]) is nn.Linear


def test_other_devices_and_dtypes_are_left_alone() -> None:
    assert not can_prepack(torch.device("cuda"), torch.float32)
    assert not can_prepack(CPU, torch.float16)
