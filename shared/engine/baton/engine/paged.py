"""Attention of a few queries over the pool in place, by our own kernel: CPU, bfloat16.

native/attention.c reads KV where it lies, once for all query heads that share it; torch's kernels
need it gathered first, and without AMX compute bfloat16 several times slower. Prompts' many queries
are left to torch.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch

from baton.core.errors import Internal, Unsupported
from baton.engine.attention import AttentionOptions, LayerShape
from baton.engine.kernels import find_library
from baton.engine.ragged import AttentionBatch
from baton.engine.sdpa import SdpaBackend

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
    """One call per layer for all rows with few queries; `SdpaBackend` for the others."""

    name: ClassVar[str] = "paged"

    def __init__(self) -> None:
        """Raises: Unsupported: there is no kernel for this CPU."""
        library = find_library()
        if library is None:
            raise Unsupported("it has no kernel for this CPU, or was installed without a compiler")
        self._attend = library.baton_attend
        self._attend.argtypes = [ctypes.POINTER(_Attention)]
        self._attend.restype = None
        self._long = SdpaBackend()

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        output = torch.empty(query.shape, dtype=query.dtype)
        if batch.num_folded_rows:
            self._attend_folded(query.contiguous(), keys, values, batch, options, output)
        for group in batch.groups(options.window, batch.num_folded_rows):
            part = self._long.attend_group(query, keys, values, group, options)
            output[group.token_start : group.token_end] = part
        return output

    def _attend_folded(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        options: AttentionOptions,
        output: torch.Tensor,
    ) -> None:
        _, num_heads, head_dim = query.shape
        _, block_size, num_kv_heads, _ = keys.shape
        if values.shape != keys.shape or not (keys.is_contiguous() and values.is_contiguous()):
            raise Internal("the pool's keys and values differ, or are not contiguous")
        if query.dtype is not torch.bfloat16 or keys.dtype not in {torch.bfloat16, torch.int8}:
            raise Internal(f"the kernel takes no queries of {query.dtype} and keys of {keys.dtype}")
        if batch.largest_block >= len(keys):
            raise Internal(f"block {batch.largest_block} is not one of the pool's {len(keys)}")
        rows = batch.paged_rows
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        attention = _Attention(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            rows.query_starts.data_ptr(),
            rows.context_lens.data_ptr(),
            rows.block_table.data_ptr(),
            batch.num_folded_rows,
            rows.block_table.shape[1],
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            keys.dtype is torch.int8,
            options.window or 0,
            torch.get_num_threads(),
            options.scaling,
            options.softcap or 0.0,
        )
        self._attend(attention)


def why_not(shape: LayerShape, dtype: torch.dtype) -> str | None:
    """What a layer asks for that the kernel does not have; None when it can attend."""
    if dtype is not torch.bfloat16:
        return f"it computes in bfloat16, not in {str(dtype)[6:]}"
    if shape.head_dim > _MAX_HEAD_DIM or shape.head_dim % _HEAD_DIM_MULTIPLE:
        return (
            f"it takes heads of at most {_MAX_HEAD_DIM} in multiples of {_HEAD_DIM_MULTIPLE}, "
            f"not of {shape.head_dim}"
        )
    return None
