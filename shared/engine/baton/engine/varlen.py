"""Attention over the pool in place, by torch's flash kernel for variable lengths: CUDA, 16 bits.

What the kernel takes was read from torch 2.13. Without a further package it is FlashAttention 2:
pages of a multiple of 256 tokens, no soft cap, no sinks. Splitting a row's keys over several thread
blocks (`num_splits` other than 1) leaves rows of paged batches unwritten (pytorch issue 194167);
without splitting, a row's result does not depend on the rows beside it either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from baton.core.errors import Unsupported
from baton.engine.attention import AttentionOptions, LayerShape
from baton.engine.ragged import AttentionBatch

Kernel = Callable[..., Any]
"""torch.nn.attention.varlen.varlen_attn, or what is called like it."""

PAGE_TOKENS = 256
"""Block sizes that the kernel takes are multiples of this."""
_NUM_SPLITS = 1
_MIN_CAPABILITY = (8, 0)
_DTYPES = frozenset({torch.bfloat16, torch.float16})
_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
_ARGUMENTS = {"enable_gqa", "seqused_k", "block_table", "num_splits"}
"""What earlier versions of torch lack."""


class VarlenBackend:
    """One kernel call per layer for the whole batch: nothing is gathered, padded or masked."""

    name: ClassVar[str] = "varlen"

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        rows = batch.paged_rows
        # The kernel counts the keys to the left of a token; ours counts the token, too.
        num_left = -1 if options.window is None else options.window - 1
        output: torch.Tensor = self._kernel(
            query,
            keys,
            values,
            rows.query_starts,
            rows.context_starts,
            rows.max_num_queries,
            rows.max_context_len,
            scale=options.scaling,
            window_size=(num_left, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=rows.context_lens,
            block_table=rows.block_table,
            num_splits=_NUM_SPLITS,
        )
        return output


def find_kernel(device: torch.device, dtype: torch.dtype, block_size: int) -> Kernel:
    """Torch's kernel.

    Raises:
        Unsupported: it cannot run here; the message says why.
    """
    if device.type != "cuda":
        raise Unsupported(f"it needs a CUDA device, this is {device.type}")
    if dtype not in _DTYPES:
        raise Unsupported(f"it computes in bfloat16 or float16, not in {str(dtype)[6:]}")
    if block_size % PAGE_TOKENS:
        raise Unsupported(f"it needs a multiple of {PAGE_TOKENS} as block_size, not {block_size}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        raise Unsupported(
            f"it needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
        )
    # Not at the top: importing it sets up operators that a CPU never needs.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    if not inspect.signature(varlen_attn).parameters.keys() >= _ARGUMENTS:
        raise Unsupported(f"torch {torch.__version__} has it without paged KV; 2.13 has it")
    return varlen_attn


def why_not(shape: LayerShape) -> str | None:
    """What a layer asks for that the kernel does not have; None when it can attend."""
    if shape.has_softcap:
        return "it has no soft cap"
    if shape.has_sinks:
        return "it has no attention sinks"
    return shape.why_head_does_not_fit(_MAX_HEAD_DIM, _HEAD_DIM_MULTIPLE)
