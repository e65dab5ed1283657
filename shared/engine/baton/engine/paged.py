"""Attention over the pool in place, by our own kernel: CPU, bfloat16.

native/attention.c reads KV where it lies, once for all query heads that share it; torch's kernel
needs it gathered first, and without AMX computes bfloat16 two to three times slower.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch

from baton.core.errors import Internal, Unsupported
from baton.core.hashing import INT8_SCALE_BYTES
from baton.engine.attention import AttentionOptions, LayerShape
from baton.engine.kernels import find_products
from baton.engine.ragged import AttentionBatch

_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 32
_POINTERS = (
    *("query", "keys", "values", "out", "sinks"),
    *("query_starts", "context_lens", "block_table"),
)
_SIZES = (
    *("num_rows", "table_width", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    *("is_int8", "window", "num_threads"),
)


class _Attention(ctypes.Structure):
    """`Attention` of native/attention.c, which says what the parts are."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class PagedBackend:
    """One call per layer for the whole batch: nothing is gathered, padded or masked."""

    name: ClassVar[str] = "paged"

    def __init__(self) -> None:
        """Raises: Unsupported: there is no kernel for this CPU."""
        library = find_products()
        if library is None:
            raise Unsupported("it has no kernel for this CPU, or was installed without a compiler")
        self._attend = library.baton_attend
        self._attend.argtypes = [ctypes.POINTER(_Attention)]
        self._attend.restype = None

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        _, num_heads, head_dim = query.shape
        _, block_size, num_kv_heads, size = keys.shape
        is_int8 = keys.dtype is torch.int8
        if values.shape != keys.shape or not (keys.is_contiguous() and values.is_contiguous()):
            raise Internal("the pool's keys and values differ, or are not contiguous")
        if query.dtype is not torch.bfloat16 or keys.dtype not in {torch.bfloat16, torch.int8}:
            raise Internal(f"the kernel takes no queries of {query.dtype} and keys of {keys.dtype}")
        if size != (head_dim + INT8_SCALE_BYTES if is_int8 else head_dim):
            raise Internal(f"keys of {size} do not fit queries of {head_dim}")
        if batch.largest_block >= len(keys):
            raise Internal(f"block {batch.largest_block} is not one of the pool's {len(keys)}")
        rows = batch.paged_rows
        query = query.contiguous()
        output = torch.empty_like(query)
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        attention = _Attention(
            query=query.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            out=output.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            query_starts=rows.query_starts.data_ptr(),
            context_lens=rows.context_lens.data_ptr(),
            block_table=rows.block_table.data_ptr(),
            num_rows=len(rows.context_lens),
            table_width=rows.block_table.shape[1],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            is_int8=is_int8,
            window=options.window or 0,
            num_threads=torch.get_num_threads(),
            scaling=options.scaling,
            softcap=options.softcap or 0.0,
        )
        self._attend(attention)
        return output


def why_not(shape: LayerShape, dtype: torch.dtype) -> str | None:
    """What a layer asks for that the kernel does not have; None when it can attend."""
    if dtype is not torch.bfloat16:
        return f"it computes in bfloat16, not in {str(dtype)[6:]}"
    return shape.why_head_does_not_fit(_MAX_HEAD_DIM, _HEAD_DIM_MULTIPLE)
