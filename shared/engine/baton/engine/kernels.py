"""Our own kernels (native/), and products of rows with a weight by them.

For CPUs with AVX-512 BF16 and VNNI, and products for those without AMX, where oneDNN reads a weight
for one row at half the speed of memory; ours reads at all of it. Elsewhere, and where the package
was installed without a C compiler, oneDNN computes (linears.py, quantize_linears.py).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from baton.core.errors import Internal
from baton.engine.pages import LargePages

logger = logging.getLogger(__name__)

Weight = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""A weight [out_features, in_features], scale and bias [out_features]."""
NormKernel = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

BLOCK = 64
"""Outputs whose weights lie together."""
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
"""The kernels' numbers of them."""
_NATIVE = Path(__file__).parent / "native"
_NEEDED = ("avx512_bf16", "avx512_vnni", "avx512_bw", "avx512_vl", "avx512_dq")
_NORM_MULTIPLE = 16
_ROUNDING_BYTES = 12
_INT8_ZERO = 128
_MAX_INT8_INPUTS = 65_536
"""More could overflow the sums."""


@functools.cache
def find_library() -> ctypes.CDLL | None:
    """The kernels, if this CPU takes them and they were compiled; a warning if they were not."""
    capabilities = torch.cpu.get_capabilities()
    if not all(capabilities.get(name) for name in _NEEDED):
        return None
    try:
        library = ctypes.CDLL(str(_NATIVE / "kernels.so"))
    except OSError as error:
        _warn(str(error))
        return None
    library.baton_version.restype = ctypes.c_uint32
    sources = [source.read_bytes() for source in sorted(_NATIVE.glob("*.[ch]"))]
    if library.baton_version() != zlib.crc32(b"".join(sources)):
        _warn("they were made from other sources")
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.baton_bf16.argtypes = [*[pointer] * 4, *[size] * 4, number, number]
    library.baton_int8.argtypes = [*[pointer] * 7, *[size] * 4, number, number]
    library.baton_rms_norm.argtypes = [*[pointer] * 3, size, size, ctypes.c_float, number]
    for function in (library.baton_bf16, library.baton_int8, library.baton_rms_norm):
        function.restype = None
    return library if library.baton_is_supported() else None


def _warn(reason: str) -> None:
    logger.warning(
        "decoding will be slower: the kernels for this CPU are not there (%s); to have them, "
        "install a C compiler and then baton-engine again (make setup)",
        reason,
    )


def find_products() -> ctypes.CDLL | None:
    """The kernels, where their products are faster than oneDNN's: not on CPUs with AMX."""
    return None if torch.cpu.get_capabilities().get("amx_bf16") else find_library()


def norm_kernel(weight: torch.Tensor) -> NormKernel | None:
    """RMS norms of inputs [..., size] with a weight [size] and an epsilon, if there is a kernel."""
    library = find_library() if weight.device.type == "cpu" else None
    if library is None or weight.dtype is not torch.bfloat16 or weight.numel() % _NORM_MULTIPLE:
        return None
    size, compute = weight.numel(), library.baton_rms_norm

    def norm(inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inputs = inputs.contiguous()
        output = torch.empty_like(inputs)
        data = inputs.data_ptr(), weight.data_ptr(), output.data_ptr()
        compute(*data, inputs.numel() // size, size, epsilon, torch.get_num_threads())
        return output

    return norm


def can_multiply(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel exists for rows of `dtype` and a weight [out_features, in_features]."""
    if weight.device.type != "cpu" or dtype is not torch.bfloat16 or find_products() is None:
        return False
    in_features = weight.shape[1]
    if weight.dtype is torch.int8:
        return in_features % 16 == 0 and 0 < in_features <= _MAX_INT8_INPUTS
    return weight.dtype is torch.bfloat16 and in_features % 2 == 0


class Product:
    """Rows times a weight, plus a bias, and perhaps gated.

    The weight is bfloat16, or int8 with a scale of each output. An `activation` says that the first
    half of the outputs are gates: what comes out is activation(gate) * rest, half as wide. A row's
    output does not depend on the rows beside it.
    """

    def __init__(self, parts: Sequence[Weight], activation: str | None = None) -> None:
        """Takes weights whose outputs follow each other, all of them with or without the rest."""
        self.parts: Sequence[Weight] = parts
        """What it was made of, as long as it is not packed."""
        library = find_library()
        if library is None:
            raise Internal("no kernels here: can_multiply says so")
        self._library = library
        weights, scales, biases = zip(*parts, strict=True)
        num_outputs, self.in_features = sum(map(len, weights)), weights[0].shape[1]
        self.out_features = num_outputs // 2 if activation else num_outputs
        self._activation = ACTIVATIONS[activation]
        self._scale, self._bias = self._floats(scales), self._floats(biases)
        self._blocks: torch.Tensor | None = None

    def pack(self, pages: LargePages) -> None:
        """Copies the weights into blocks and lets them go; for good."""
        if self.parts:
            self._blocks = self._packed(pages)
            self.parts = ()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """bfloat16 [..., in_features] to [..., out_features]."""
        *shape, size = inputs.shape
        if inputs.dtype is not torch.bfloat16 or size != self.in_features:
            raise Internal(f"inputs of {inputs.dtype}, {size} do not fit the weight")
        # Not packed yet: loading a model tries its layers before it packs them.
        blocks = self._packed(LargePages()) if self._blocks is None else self._blocks
        inputs = inputs.contiguous()
        num_rows = inputs.numel() // size
        output = torch.empty(*shape, self.out_features, dtype=torch.bfloat16)
        bias = None if self._bias is None else self._bias.data_ptr()
        data = inputs.data_ptr(), blocks.data_ptr()
        sizes = (num_rows, size, self.out_features, len(blocks))
        how = (self._activation, torch.get_num_threads())
        if self._scale is None:
            self._library.baton_bf16(*data, bias, output.data_ptr(), *sizes, *how)
            return output
        scratch = torch.empty(num_rows * (2 * size + _ROUNDING_BYTES), dtype=torch.uint8)
        halves = scratch.data_ptr()
        scale, roundings = self._scale.data_ptr(), halves + 2 * size * num_rows
        self._library.baton_int8(
            *data, scale, bias, output.data_ptr(), halves, roundings, *sizes, *how
        )
        return output

    def _in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[outputs, ...] to [num_blocks, 64, ...], with zeros behind; gates meet their rest."""
        if self._activation:
            halves = [_blocks_of(half, BLOCK // 2) for half in values.tensor_split(2)]
            return torch.cat(halves, 1)
        return _blocks_of(values, BLOCK).contiguous()

    def _floats(self, parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        found = [part.float() for part in parts if part is not None]
        return self._in_blocks(torch.cat(found)) if found else None

    def _packed(self, pages: LargePages) -> torch.Tensor:
        """[num_blocks, in_features / group, 64] groups: 2 bfloat16 or 4 int8 inputs, as int32."""
        weights = [weight for weight, _, _ in self.parts]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if weight.dtype is torch.int8:
            weight = weight.view(torch.uint8).bitwise_xor(_INT8_ZERO)
        # As numbers of the size of a group, which are moved whole.
        blocks = self._in_blocks(weight).view(torch.int32).transpose(1, 2)
        return pages.empty(tuple(blocks.shape), torch.int32).copy_(blocks)


def _blocks_of(values: torch.Tensor, size: int) -> torch.Tensor:
    """[outputs, ...] to [num_blocks, size, ...], with zeros behind."""
    missing = -len(values) % size
    if missing:
        values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
    return values.view(-1, size, *values.shape[1:])
