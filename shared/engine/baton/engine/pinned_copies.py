"""Copies between a device's KV and host memory, beside what the device computes.

A copy goes through pinned memory and on a separate stream. That stream first waits for what was
queued before, since blocks may just have been computed, or may still be written to by a step of
the sequence that had them last. A call returns when its copy is over, so whatever is queued later
sees it; torch keeps the pinned memory for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


class PinnedCopies:
    """For any number of threads. On CPU the same steps, without streams and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._is_cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def read(self, parts: Sequence[torch.Tensor], block_ids: Sequence[int]) -> torch.Tensor:
        """Blocks of tensors, one after the other, as uint8 on the host."""
        num_bytes = sum(part[0].nbytes for part in parts) * len(block_ids)
        host = self._host_memory(num_bytes)
        with self._beside_compute():
            index = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
            gathered = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            for part, cut in cut_up(gathered, parts, len(block_ids)):
                torch.index_select(part, 0, index, out=cut)
            host.copy_(gathered, non_blocking=True)
        return host

    def write(
        self, parts: Sequence[torch.Tensor], block_ids: Sequence[int], payload: memoryview
    ) -> None:
        """The reverse of `read`."""
        host = self._host_memory(payload.nbytes)
        host.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        with self._beside_compute():
            index = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
            arrived = host.to(self._device, non_blocking=True)
            for part, cut in cut_up(arrived, parts, len(block_ids)):
                part.index_copy_(0, index, cut)

    def _host_memory(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)

    @contextmanager
    def _beside_compute(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def cut_up(
    content: torch.Tensor, parts: Sequence[torch.Tensor], num_blocks: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor with the place of its blocks in `content`, uint8."""
    offset = 0
    for part in parts:
        end = offset + part[0].nbytes * num_blocks
        cut = content[offset:end].view(part.dtype)
        yield part, cut.view(num_blocks, *part.shape[1:])
        offset = end
