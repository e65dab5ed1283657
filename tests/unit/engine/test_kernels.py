from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear, silu
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from baton.core.errors import Internal, Unsupported
from baton.engine import kernels
from baton.engine.fusion import fuse_gated, merge_siblings, pack_products
from baton.engine.kernels import Product, can_multiply, norm_kernel
from baton.engine.linears import KernelLinear, PackedLinear, packer, replace_linears
from baton.engine.paged import PagedBackend
from baton.engine.pages import LargePages
from baton.engine.quantize import Quantization, quantize_weight
from baton.engine.quantize_linears import make_linear

SHAPES = [(96, 48), (41, 32), (10, 16), (320, 4864)]
ROW_COUNTS = [0, 1, 2, 3, 5, 6, 7, 12, 13, 50]
WEIGHT = torch.ones(64, 64, dtype=torch.bfloat16)
has_cpu = all(torch.cpu.get_capabilities().get(name) for name in kernels._NEEDED)
needs_kernels = pytest.mark.skipif(
    kernels.find_library() is None, reason="no kernels for this CPU, or no C compiler"
)


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where products are theirs, too: they run on any CPU that norms run on."""
    found = {**torch.cpu.get_capabilities(), "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def _weight(num_out: int, num_in: int) -> torch.Tensor:
    return torch.randn(num_out, num_in).bfloat16()


def _int8(num_out: int, num_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8), torch.rand(num_out)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm()) if wanted.numel() else 0.0


@needs_kernels
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_what_torch_computes(num_out: int, num_in: int, has_bias: bool) -> None:
    torch.manual_seed(1)
    bias = torch.randn(num_out) if has_bias else None
    weight = _weight(num_out, num_in)
    levels, scale = _int8(num_out, num_in)
    for num_rows in ROW_COUNTS:
        rows = torch.randn(num_rows, num_in).bfloat16()
        wanted = linear(rows.float(), weight.float(), bias)
        assert _error(Product([(weight, None, bias)])(rows), wanted) < 0.003
        wanted = linear(rows.float(), levels.float() * scale[:, None], bias)
        assert _error(Product([(levels, scale, bias)])(rows), wanted) < 0.003


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gated_products_are_what_torch_computes(
    activation: str, num_out: int, num_in: int, has_bias: bool
) -> None:
    torch.manual_seed(2)
    bias = torch.randn(2 * num_out) if has_bias else None
    parts = None if bias is None else bias.tensor_split(2)
    weight = _weight(2 * num_out, num_in)
    rows = (3 * torch.randn(7, num_in)).bfloat16()
    gate, up = linear(rows.float(), weight.float(), bias).tensor_split(2, 1)
    wanted = (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up
    both = Product([(weight, None, bias)], activation)
    halves = enumerate(weight.tensor_split(2))
    two = Product(
        [(half, None, None if parts is None else parts[index]) for index, half in halves],
        activation,
    )
    assert _error(both(rows), wanted) < 0.003
    assert torch.equal(both(rows), two(rows))


@needs_kernels
def test_activations_hold_at_both_ends() -> None:
    eye = torch.eye(64, dtype=torch.bfloat16)
    values = torch.tensor([-1e30, -200.0, -80.0, -3.0, 0.0, 3.0, 200.0, 1e30]).repeat(8).bfloat16()
    one = torch.ones(64)
    product = Product([(eye, None, None), (torch.zeros_like(eye), None, None)], "silu")
    ones = Product([(eye, None, one), (torch.zeros_like(eye), None, one)], "silu")
    assert not product(values[None]).any(), "times 0"
    torch.testing.assert_close(ones(values[None])[0], silu(values.float() + 1).bfloat16())


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_an_input_that_is_no_number_gives_no_numbers(value: float) -> None:
    levels, scale = _int8(96, 64)
    rows = torch.randn(4, 64).bfloat16()
    rows[1, 5] = value
    found = Product([(levels, scale, None)])(rows)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()
    gate = torch.eye(64).bfloat16()
    gated = Product([(gate, None, None), (gate, None, None)], "silu")(rows)
    assert not gated[1, 5].isfinite() or value == -torch.inf
    assert gated[[0, 2, 3]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(threads: int) -> None:
    torch.manual_seed(3)
    weight, (levels, scale) = _weight(200, 96), _int8(200, 96)
    rows = torch.randn(13, 96).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for product in (Product([(weight, None, None)]), Product([(levels, scale, None)])):
            together = product(rows)
            for index, row in enumerate(rows):
                assert torch.equal(product(row[None])[0], together[index])
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    product = Product([(_weight(16, 32), None, None)])
    for rows in (torch.ones(2, 32), torch.ones(2, 16).bfloat16(), torch.ones(16).bfloat16()):
        with pytest.raises(Internal, match="do not fit"):
            product(rows)


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 600])
def test_norms_are_what_transformers_computes(num_rows: int) -> None:
    torch.manual_seed(5)
    norm = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data.normal_()
    kernel = norm_kernel(norm.weight)
    assert kernel is not None
    rows = torch.randn(1, num_rows, 64).bfloat16()
    rows[0, 0] *= 1e-3
    with torch.inference_mode():
        torch.testing.assert_close(kernel(rows, norm.weight, 1e-5), norm(rows))
        assert torch.equal(
            kernel(rows, norm.weight, 1e-5)[:, :1], kernel(rows[:, :1], norm.weight, 1e-5)
        )
    assert norm_kernel(norm.weight[:40]) is None
    assert norm_kernel(norm.weight.float()) is None


@needs_kernels
def test_packing_changes_nothing_and_lets_the_weight_go() -> None:
    weight, (levels, scale) = _weight(41, 32), _int8(41, 32)
    rows = torch.randn(3, 32).bfloat16()
    for given, its_scale in ((weight, None), (levels, scale)):
        product = Product([(given, its_scale, torch.randn(41))])
        before = product(rows)
        held = weakref.ref(given)
        product.pack(LargePages())
        assert not product.parts
        assert torch.equal(product(rows), before)
        del given
    del weight, levels
    gc.collect()
    assert held() is None


@needs_kernels
def test_layers_of_a_model_take_them_and_mlps_become_one_product() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = nn.Linear(64, 96, bias=False)
            self.up_proj = nn.Linear(64, 96, bias=False)
            self.down_proj = nn.Linear(96, 64, bias=False)
            self.act_fn = ACT2FN["silu"]

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))

    torch.manual_seed(4)
    inputs = torch.randn(1, 5, 64).bfloat16()
    with torch.inference_mode():
        model = nn.Sequential(Mlp()).bfloat16()
        wanted = model(inputs).float()
        replace_linears(model, packer(8))
        assert fuse_gated(model, torch.bfloat16) == 1
        assert sum(isinstance(part, KernelLinear) for part in model.modules()) == 2
        assert pack_products(model) == 2
        assert _error(model(inputs), wanted) < 0.01
        quantized = nn.Sequential(Mlp()).bfloat16()
        wanted = quantized(inputs).float()
        merge_siblings(quantized, [("gate_proj", "up_proj")])
        mlp = quantized[0]
        for parent, name in ((mlp.gate_proj, "merged"), (mlp, "down_proj")):
            tensors = quantize_weight(getattr(parent, name).weight, Quantization("int8"))
            setattr(parent, name, make_linear("int8", tensors, None, torch.bfloat16))
        assert fuse_gated(quantized, torch.bfloat16) == 1
        assert pack_products(quantized) == 2
        assert _error(quantized(inputs), wanted) < 0.02


def test_only_weights_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_library", lambda: object())
    assert can_multiply(WEIGHT, torch.bfloat16)
    assert not can_multiply(WEIGHT, torch.float32)
    assert not can_multiply(WEIGHT.float(), torch.bfloat16)
    assert not can_multiply(WEIGHT[:, :63], torch.bfloat16), "an odd number of inputs"
    assert can_multiply(WEIGHT.char(), torch.bfloat16)
    assert not can_multiply(WEIGHT.char()[:, :40], torch.bfloat16)
    wide = torch.empty(1, kernels._MAX_INT8_INPUTS + 16, dtype=torch.int8)
    assert not can_multiply(wide, torch.bfloat16), "sums could overflow"
    assert not can_multiply(WEIGHT.to("meta"), torch.bfloat16)


@pytest.fixture
def fresh() -> Iterator[None]:
    kernels.find_library.cache_clear()
    yield
    kernels.find_library.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not has_cpu, reason="no kernels for this CPU")
def test_without_the_library_onednn_computes_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_NATIVE", tmp_path)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    with caplog.at_level(logging.WARNING):
        replace_linears(model, packer(8))
        replace_linears(model, packer(8))
    assert isinstance(model[0], PackedLinear)
    assert caplog.text.count("install a C compiler") == 1


@pytest.mark.usefixtures("fresh")
@needs_kernels
def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for path in kernels._NATIVE.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "products.c").write_text("changed since")
    monkeypatch.setattr(kernels, "_NATIVE", tmp_path)
    assert not can_multiply(WEIGHT, torch.bfloat16)
    assert "made from other sources" in caplog.text


def test_cpus_with_amx_are_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_library", lambda: object())
    assert can_multiply(WEIGHT, torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert not can_multiply(WEIGHT, torch.bfloat16)
    with pytest.raises(Unsupported, match="no kernel for this CPU"):
        PagedBackend()


@pytest.mark.skipif(not has_cpu or shutil.which("cc") is None, reason="no such CPU or no compiler")
def test_installing_the_package_has_compiled_them() -> None:
    assert (kernels._NATIVE / "kernels.so").is_file(), "run make setup"
