"""Memory on large pages: weights are read up to half as fast again from them.

A core's list of addresses holds few pages of 4 KiB, and its prefetcher stops at each one's end.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64


class LargePages:
    """Room for CPU tensors on pages of 2 MiB, where the system has them.

    It is taken from the system in chunks; a chunk goes when the last tensor in it goes.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any contents."""
        num_bytes = math.prod(shape) * dtype.itemsize
        wanted = num_bytes + -num_bytes % _ALIGNMENT_BYTES
        if wanted > len(self._chunk):
            self._chunk = _chunk(max(wanted, _CHUNK_BYTES))
        found, self._chunk = self._chunk[:num_bytes], self._chunk[wanted:]
        return found.view(dtype).view(shape)


def give_back_free_memory() -> None:
    """Has the C library give the system what it keeps of freed tensors, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _chunk(num_bytes: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    # Private: the system has other rules for shared memory. The tensor keeps it.
    memory = mmap.mmap(-1, num_bytes + _PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        # A system without them: then these are small pages.
        return torch.frombuffer(memory, dtype=torch.uint8)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    start = -room.data_ptr() % _PAGE_BYTES
    return room[start : start + num_bytes]
