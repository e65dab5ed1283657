"""Linear layers over quantized weights. Each is made of the tensors that a checkpoint holds.

The operators are torch's own, and some are private: nothing else knows of them. Which one computes
how many rows was measured (2 cores with AVX-512 VNNI and AMX, torch 2.13, Nov 2026); see
docs/quantization.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from baton.core.errors import Unsupported
from baton.engine.kernels import Product, can_multiply
from baton.engine.quantize import FP8_MAX, INT8_MAX, dequantize_int4, int4_levels

MAX_SPLIT_ROWS = 64
"""More rows than these and int8 weights are better turned into floats for a plain product."""
MAX_SMALL_ROWS = 2
MAX_INT4_ROWS = 16
"""Likewise for torch's int4 kernel, which multiplies row by row."""
_SPLIT = 2 * INT8_MAX
_ZERO = 128
"""What uint8 rows hold for 0."""
_MAX_SMALL_WEIGHTS = 500_000
_MIN_FP8_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16
_INT4_OUT_MULTIPLE = 16
_DTYPES = frozenset({torch.float32, torch.bfloat16})


Tensors = Mapping[str, torch.Tensor]
"""What `quantize_weight` makes of a weight, by name."""


class QuantizedLinear(nn.Module, ABC):
    """Computes `inputs @ weight.T + bias` over some quantized weight."""

    values_per_byte: ClassVar[int] = 1

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, num_bytes = tensors["qweight"].shape
        self.in_features = num_bytes * self.values_per_byte
        self.bias = bias
        self.dtype = dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], both of `dtype`."""
        rows = inputs.reshape(-1, self.in_features)
        shape = (*inputs.shape[:-1], self.out_features)
        if not len(rows):
            return inputs.new_empty(shape)
        output = self.multiply(rows)
        if self.bias is not None:
            output += self.bias
        return output.view(shape)

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, in_features] to [num_rows, out_features], without bias."""


class _Int8Layer(QuantizedLinear):
    """What both int8 layers share: torch's weight-only kernel for a row or two and small weights.

    Those stay in a cache, where oneDNN's kernel takes longer to call than to compute.
    """

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, bias, dtype)
        weight = tensors["qweight"]
        self._scale = tensors["scale"].to(dtype)
        is_small = dtype is torch.bfloat16 and weight.numel() <= _MAX_SMALL_WEIGHTS
        self._small = weight if is_small else None

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear."""
        if self._small is not None and len(rows) <= MAX_SMALL_ROWS:
            return torch.ops.aten._weight_int8pack_mm(rows, self._small, self._scale)  # type: ignore[no-any-return]
        return self.multiply_many(rows)

    @abstractmethod
    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """`multiply`, for what is left."""


class Int8Linear(_Int8Layer):
    """int8 weights, activations as they are.

    Kernels for int8 read each weight once, as fast as memory gives it, where torch's
    weight-only kernel is held up by conversions. They take int8 inputs, so each row is written as
    254 * high + low with both in int8: 15 bits and a sign, more than bfloat16 has. The sums are
    exact integers, and a row's result does not depend on the rows beside it. Ours does all of that
    at once; oneDNN's needs operators around it.
    """

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, bias, dtype)
        self.product: Product | None = None
        self._product: _Int8Product | None = None
        self._weight: torch.Tensor | None = tensors["qweight"]
        if can_multiply(tensors["qweight"], dtype):
            self.product = Product([(tensors["qweight"], tensors["scale"], bias)])
            self.bias = self._weight = self._small = None
        elif has_int8_kernels():
            self._product, self._weight = _Int8Product(tensors), None

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """See _Int8Layer."""
        if self.product is not None:
            return self.product(rows)
        if self._product is not None and len(rows) <= MAX_SPLIT_ROWS:
            return self._multiply_split(rows, self._product)
        weight = self._weight if self._product is None else self._product.weight()
        return linear(rows, weight.to(self.dtype)).mul_(self._scale)  # type: ignore[union-attr]

    def _multiply_split(self, rows: torch.Tensor, product: _Int8Product) -> torch.Tensor:
        unit = _largest(rows).div_(INT8_MAX * _SPLIT)
        scaled = rows / unit
        high = torch.mul(scaled, 1 / _SPLIT).round_()
        low = scaled.sub_(high, alpha=_SPLIT).round_()
        sums = product(torch.cat([high, low]), torch.float32)
        total = torch.add(sums[len(rows) :], sums[: len(rows)], alpha=_SPLIT)
        return total.mul_(unit).to(self.dtype)


class Int8DynamicLinear(_Int8Layer):
    """int8 weights, and activations rounded to int8 with one scale per row."""

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, bias, dtype)
        if not has_int8_kernels():
            raise Unsupported(
                "int8-dynamic needs oneDNN's int8 kernels and a CPU with VNNI; use int8"
            )
        self._product = _Int8Product(tensors)

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """See _Int8Layer."""
        # One short of the largest int8, because the unit is rounded to the rows' dtype.
        unit = _largest(rows).div_(INT8_MAX - 1).to(self.dtype)
        levels = (rows / unit.float()).round_()
        return self._product(levels, self.dtype).mul_(unit)


class Int4Linear(QuantizedLinear):
    """int4 weights with a scale and a zero per group of inputs, activations as they are."""

    values_per_byte = 2

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, bias, dtype)
        qweight, scale = tensors["qweight"], tensors["scale"]
        self._tensors = {part: tensors[part] for part in ("qweight", "scale", "zero")}
        self._group_size = self.in_features // scale.shape[1]
        self._packed: torch.Tensor | None = None
        if self.out_features % _INT4_OUT_MULTIPLE == 0:
            levels = int4_levels(qweight).to(torch.int32)
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
            pairs = torch.stack([scale.t(), tensors["zero"].t()], dim=2)
            self._pairs = pairs.contiguous().to(dtype)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear."""
        if self._packed is None or len(rows) > MAX_INT4_ROWS:
            return linear(rows, dequantize_int4(**self._tensors, dtype=self.dtype))
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._packed, self._group_size, self._pairs
        )
        return output


class Fp8Linear(QuantizedLinear):
    """float8 weights, and activations rounded to float8 with one scale per row. CUDA only."""

    def __init__(self, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, bias, dtype)
        self._weight, self._scale = tensors["qweight"], tensors["scale"]
        if self.in_features % _FP8_MULTIPLE or self.out_features % _FP8_MULTIPLE:
            raise Unsupported(
                f"fp8 takes layers whose sizes are multiples of {_FP8_MULTIPLE}, not "
                f"{self.in_features} to {self.out_features}"
            )

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear."""
        unit = _largest(rows).div_(FP8_MAX)
        levels = (rows / unit).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            levels, self._weight.t(), scale_a=unit, scale_b=self._scale[None], out_dtype=self.dtype
        )


_SMALLEST = 1e-30
"""Stands in for the largest value of a row of zeros."""
_LINEARS: Mapping[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int8-dynamic": Int8DynamicLinear,
    "int4": Int4Linear,
    "fp8": Fp8Linear,
}


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each row, float32 [num_rows, 1]; not 0."""
    # A norm of infinite order is the same and takes five times as long.
    return rows.abs().amax(1, keepdim=True).float().clamp_(min=_SMALLEST)


class _Int8Product:
    """int8 rows times int8 weights by oneDNN (VNNI, AMX), the columns scaled.

    The rows go in as uint8 with a zero point: for signed rows oneDNN falls to its reference
    implementation, hundreds of times slower, on CPUs that have VNNI and no AMX.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(tensors["qweight"], None)
        # Looking it up takes as long as a small layer.
        self._linear = torch.ops.onednn.qlinear_pointwise.default
        self._scale = tensors["scale"]
        self._zeros = torch.zeros(len(self._scale), dtype=torch.int32)

    def __call__(self, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Whole numbers within int8 [num_rows, in_features] to `dtype` [num_rows, out_features].

        `levels` are floats, and are overwritten.
        """
        rows, packed, scale = levels.add_(_ZERO).to(torch.uint8), self._packed, self._scale
        output: torch.Tensor = self._linear(
            rows, 1.0, _ZERO, packed, scale, self._zeros, None, 1.0, 0, dtype, "none", [], ""
        )
        return output

    def weight(self) -> torch.Tensor:
        """The int8 weight in plain layout, [out_features, in_features]; a copy."""
        plain: torch.Tensor = self._packed.to_dense()
        return plain.t()


def has_int8_kernels() -> bool:
    """Whether this torch and this CPU have oneDNN's int8 products.

    Without VNNI they add pairs of products in 16 bits, where they overflow.
    """
    is_there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    capabilities = torch.cpu.get_capabilities()
    has_vnni = any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni"))
    return is_there and has_vnni and hasattr(torch.ops.onednn, "qlinear_pointwise")


def make_linear(
    scheme: str, tensors: Tensors, bias: torch.Tensor | None, dtype: torch.dtype
) -> QuantizedLinear:
    """The layer that computes over the tensors of `quantize_weight`."""
    return _LINEARS[scheme](tensors, bias, dtype)


def check_device(scheme: str, device: torch.device, dtype: torch.dtype) -> None:
    """Whether a scheme can run.

    Raises:
        Unsupported: it cannot; the message says what would.
    """
    if dtype not in _DTYPES:
        raise Unsupported(
            f"quantized layers compute in float32 or bfloat16, not in {str(dtype)[6:]}; set dtype"
        )
    if scheme != "fp8":
        if device.type != "cpu":
            raise Unsupported(f"{scheme} runs on CPU only; on {device.type} use fp8 or none")
        return
    if device.type != "cuda":
        raise Unsupported(
            f"fp8 needs a CUDA device; on {device.type} use int8, int8-dynamic or int4"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_FP8_CAPABILITY:
        raise Unsupported(
            f"fp8 needs compute capability 8.9 or more; this device has "
            f"{capability[0]}.{capability[1]}"
        )
    if dtype is not torch.bfloat16:
        raise Unsupported("fp8 layers compute in bfloat16; set dtype")
