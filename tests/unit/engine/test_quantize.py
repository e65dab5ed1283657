from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine.quantize import (
    FP8_MAX,
    Quantization,
    dequantize_int4,
    int4_levels,
    quantization_of,
    quantize_weight,
)
from baton.engine.quantize_linears import (
    MAX_INT4_ROWS,
    MAX_SPLIT_ROWS,
    check_device,
    has_int8_kernels,
    make_linear,
)
from baton.engine.quantize_model import _place_layers

CPU = torch.device("cpu")
BF16_ROUNDING = 2.0**-8
NUM_ROWS = (1, 3, MAX_INT4_ROWS + 1, MAX_SPLIT_ROWS + 1)


def _weight(num_out: int = 48, num_in: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator)
    weight *= torch.rand(num_out, 1, generator=generator) * 3
    weight[5] = 0
    return weight


def _rows(num_rows: int, num_in: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_rows))
    return (rows * torch.linspace(0.01, 50, num_rows).view(-1, 1)).to(dtype)


def _dequantized(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    tensors = quantize_weight(weight, quantization)
    if quantization.scheme == "int4":
        return dequantize_int4(**tensors, dtype=torch.float32)
    return tensors["qweight"].float() * tensors["scale"][:, None]


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_within_half_a_step(scheme: str, dtype: torch.dtype) -> None:
    weight = _weight().to(dtype)
    tensors = quantize_weight(weight, Quantization(scheme))
    scale = tensors["scale"]
    error = (_dequantized(weight, Quantization(scheme)) - weight.float()).abs()
    assert tensors["qweight"].dtype == torch.int8
    assert bool((error <= scale[:, None] * 0.5000001).all())
    steps = weight.float().abs().amax(1) / 127
    assert bool((scale[steps > 0] <= steps[steps > 0] * (1 + BF16_ROUNDING * 2)).all())
    assert torch.equal(scale, scale.bfloat16().float())


def test_a_transposed_weight_is_stored_as_kernels_read_it() -> None:
    weight = _weight()
    for scheme in ("int8", "int4"):
        plain = quantize_weight(weight, Quantization(scheme))
        turned = quantize_weight(weight.t().contiguous().t(), Quantization(scheme))
        assert turned["qweight"].is_contiguous()
        assert torch.equal(turned["qweight"], plain["qweight"])


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_weights_are_within_half_a_step_of_their_group(group_size: int) -> None:
    weight = _weight() + 0.3
    quantization = Quantization("int4", group_size=group_size)
    tensors = quantize_weight(weight, quantization)
    assert tensors["qweight"].shape == (48, 64)
    assert tensors["scale"].shape == tensors["zero"].shape == (48, 128 // group_size)
    error = (_dequantized(weight, quantization) - weight).abs().view(48, -1, group_size)
    # The zero is rounded too, which may cut off the ends of the range.
    bound = tensors["scale"].float() / 2 + tensors["zero"].float().abs() * BF16_ROUNDING
    assert bool((error.amax(2) <= bound * 1.00001).all())


@pytest.mark.parametrize("value", [0.02, -0.01, 0.3, 0.0, -7.0])
def test_int4_keeps_a_group_of_equal_weights(value: float) -> None:
    weight = torch.full((4, 128), value)
    found = _dequantized(weight, Quantization("int4", group_size=64))
    assert torch.equal(found, weight.bfloat16().float())


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(scheme: str, value: float) -> None:
    weight = _weight()
    weight[3, 5] = value
    with pytest.raises(Unsupported, match="NaN or infinity"):
        quantize_weight(weight, Quantization(scheme))


def test_int4_levels_are_unpacked_in_order() -> None:
    packed = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)
    assert int4_levels(packed).tolist() == [[1, 2, 3, 4]]


def test_fp8_weights_are_within_their_precision() -> None:
    weight = _weight()
    error = (_dequantized(weight, Quantization("fp8")) - weight).abs()
    scale = quantize_weight(weight, Quantization("fp8"))["scale"]
    # Three bits after the leading one; below 2**-6 steps are of 2**-9.
    assert bool((error <= weight.abs() * 2.0**-4 + scale[:, None] * 2.0**-10).all())


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weight_only_layers_multiply_by_the_rounded_weight(
    scheme: str, dtype: torch.dtype, num_rows: int
) -> None:
    weight, bias = _weight(), torch.linspace(-1, 1, 48).to(dtype)
    quantization = Quantization(scheme, group_size=32)
    layer = make_linear(scheme, quantize_weight(weight, quantization), bias, dtype)
    rows = _rows(num_rows, 128, dtype)
    expected = rows.float() @ _dequantized(weight, quantization).t() + bias.float()
    got = layer(rows.unsqueeze(0))
    assert got.dtype is dtype
    assert got.shape == (1, num_rows, 48)
    # int4 kernels round the weight to the dtype, bfloat16 outputs are rounded once or twice.
    tolerance = 2e-4 if dtype is torch.float32 else 2 * BF16_ROUNDING
    error = (got[0].float() - expected).abs().amax(1)
    assert bool((error <= tolerance * expected.abs().amax(1)).all())


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_dynamic_layers_round_each_row_by_its_own_largest_value(num_rows: int) -> None:
    weight = _weight()
    tensors = quantize_weight(weight, Quantization("int8-dynamic"))
    layer = make_linear("int8-dynamic", tensors, None, torch.float32)
    rows = _rows(num_rows, 128, torch.float32)
    dequantized = _dequantized(weight, Quantization("int8-dynamic"))
    # Half a step of each input, times the weights that it meets.
    step = rows.abs().amax(1, keepdim=True) / 126
    bound = (step / 2) * dequantized.abs().sum(1)
    error = (layer(rows) - rows @ dequantized.t()).abs()
    assert bool((error <= bound * 1.001 + 1e-5).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4"])
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(scheme: str) -> None:
    tensors = quantize_weight(_weight(), Quantization(scheme, group_size=32))
    layer = make_linear(scheme, tensors, None, torch.float32)
    rows = _rows(7, 128, torch.float32)
    alone = torch.cat([layer(row[None]) for row in rows])
    assert torch.equal(layer(rows), alone)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_small_and_large_weights_agree(scheme: str, num_rows: int) -> None:
    small = quantize_weight(_weight(48, 128), Quantization(scheme))
    copies = 500_000 // small["qweight"].numel() + 1
    large = {part: torch.cat([tensor] * copies) for part, tensor in small.items()}
    rows = _rows(num_rows, 128, torch.bfloat16)
    expected = make_linear(scheme, small, None, torch.bfloat16)(rows).float()
    got = make_linear(scheme, large, None, torch.bfloat16)(rows).float()[:, :48]
    error = (got - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(error.max()) < (0.01 if scheme == "int8" else 0.03)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4"])
def test_rows_of_zeros_and_no_rows(scheme: str) -> None:
    tensors = quantize_weight(_weight(), Quantization(scheme, group_size=32))
    layer = make_linear(scheme, tensors, None, torch.bfloat16)
    assert not layer(torch.zeros(2, 128, dtype=torch.bfloat16)).any()
    assert layer(torch.zeros(0, 128, dtype=torch.bfloat16)).shape == (0, 48)


_TRACED_PRODUCTS = """
import torch
from baton.engine import kernels
from baton.engine.quantize import Quantization, quantize_weight
from baton.engine.quantize_linears import make_linear

kernels.find_library = lambda: None
for scheme in ("int8", "int8-dynamic"):
    tensors = quantize_weight(torch.randn(64, 8192), Quantization(scheme))
    make_linear(scheme, tensors, None, torch.bfloat16)(torch.randn(3, 8192).bfloat16())
"""


@pytest.mark.skipif(not has_int8_kernels(), reason="this CPU has no VNNI")
def test_int8_products_do_not_fall_to_onednns_reference() -> None:
    trace = subprocess.run(
        [sys.executable, "-c", _TRACED_PRODUCTS],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    products = [line.split(",")[6] for line in trace.splitlines() if ",matmul," in line]
    assert products
    assert not [name for name in products if name.startswith(("ref", "gemm:ref"))], products


def test_int8_layers_work_without_onednns_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.engine.quantize_linears.has_int8_kernels", lambda: False)
    tensors = quantize_weight(_weight(), Quantization("int8"))
    layer = make_linear("int8", tensors, None, torch.float32)
    rows = _rows(3, 128, torch.float32)
    expected = rows @ _dequantized(_weight(), Quantization("int8")).t()
    torch.testing.assert_close(layer(rows), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(Unsupported, match="CPU with VNNI"):
        make_linear("int8-dynamic", tensors, None, torch.float32)


def test_odd_widths_run_without_the_int4_kernel() -> None:
    weight = _weight(num_out=41)
    tensors = quantize_weight(weight, Quantization("int4", group_size=32))
    layer = make_linear("int4", tensors, None, torch.float32)
    rows = _rows(2, 128, torch.float32)
    expected = rows @ dequantize_int4(**tensors, dtype=torch.float32).t()
    torch.testing.assert_close(layer(rows), expected)


@pytest.mark.parametrize("num_rows", [1, 5, 33])
def test_fp8_layers_round_rows_and_weights_and_nothing_else(num_rows: int) -> None:
    """torch has the operator on CPU, too, where it is slow: workers do not offer it there."""
    tensors = quantize_weight(_weight(num_out=48), Quantization("fp8"))
    bias = torch.randn(48, dtype=torch.bfloat16)
    rows = _rows(num_rows, 128, torch.bfloat16)
    rows[0] = 0.0
    unit = rows.float().abs().amax(1, keepdim=True).clamp_(min=1e-30) / FP8_MAX
    rounded = (rows.float() / unit).to(torch.float8_e4m3fn).float() * unit
    expected = rounded @ (tensors["qweight"].float() * tensors["scale"][:, None]).t() + bias.float()
    output = make_linear("fp8", tensors, bias, torch.bfloat16)(rows)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


def test_fp8_layers_of_odd_sizes_are_refused() -> None:
    tensors = quantize_weight(_weight(num_out=41), Quantization("fp8"))
    with pytest.raises(Unsupported, match="multiples of 16, not 128 to 41"):
        make_linear("fp8", tensors, None, torch.bfloat16)


def test_groups_that_do_not_fit_are_refused_with_those_that_do() -> None:
    with pytest.raises(Unsupported, match=r"96 input features.*groups of 64.*that fit: 32"):
        quantize_weight(torch.ones(16, 96), Quantization("int4", group_size=64))


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"quantization must be one of int8, .*, got int3"):
        Quantization("int3")
    with pytest.raises(InvalidRequest, match="group size must be one of 32, 64, 128, got 48"):
        Quantization("int4", group_size=48)


@pytest.mark.parametrize(
    ("scheme", "device", "dtype", "reason"),
    [
        ("fp8", "cpu", torch.bfloat16, "fp8 needs a CUDA device; on cpu use int8"),
        ("int8", "cuda", torch.bfloat16, "int8 runs on CPU only; on cuda use fp8"),
        ("int4", "cpu", torch.float16, "float32 or bfloat16, not in float16; set dtype"),
    ],
)
def test_devices_and_dtypes_that_cannot_run_a_scheme(
    scheme: str, device: str, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        check_device(scheme, torch.device(device), dtype)
    check_device("int8", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    "quantization",
    [Quantization("int8", has_lm_head=True), Quantization("int4", group_size=32)],
)
def test_a_config_says_how_it_was_quantized(quantization: Quantization) -> None:
    config = {"quantization_config": quantization.to_config()}
    assert quantization_of(config) == quantization
    assert quantization_of({}) is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"quant_method": "gptq"}, "quantized by gptq"),
        ({"quant_method": "baton", "version": 9, "scheme": "int8"}, "version 9"),
    ],
)
def test_other_quantizers_are_refused(found: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        quantization_of({"quantization_config": found})


@pytest.mark.parametrize("with_bias", ["q_proj", "k_proj"])
def test_siblings_of_a_checkpoint_with_a_bias_in_some_stay_apart_and_keep_it(
    with_bias: str,
) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    module = torch.nn.ModuleDict({name: torch.nn.Linear(128, 48) for name in names})
    tensors = {}
    for name in names:
        parts = quantize_weight(_weight(), Quantization("int8"))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    tensors[f"{with_bias}.bias"] = torch.ones(48)
    rows = _rows(2, 128, torch.float32)
    _place_layers(module, Quantization("int8"), tensors, torch.float32)  # type: ignore[arg-type]
    outputs = {name: module[name](rows) for name in names}
    for name in names:
        added = 1.0 if name == with_bias else 0.0
        other = outputs["v_proj"]
        torch.testing.assert_close(outputs[name], other + added)
