"""What this machine can do at most, measured in the same run: nothing here knows the engine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_READ_BYTES = 1 << 30
_GEMM_SIZE = 2048


class Floors:
    """Read bandwidth and matrix product rate of the threads that torch has.

    Both move with what else runs on the machine, so they are measured again right beside every
    step that is compared with them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._big = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=device)
        self._left = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype)
        self._right = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype)
        self.bytes_per_s: list[float] = []
        """Every measurement."""
        self.flops: list[float] = []
        """Every measurement, per second."""

    def measure_read(self) -> float:
        """Bytes per second of one pass over 1 GiB."""
        rate = _READ_BYTES / timed(self._big.sum, self._device)
        self.bytes_per_s.append(rate)
        return rate

    def measure_gemm(self) -> float:
        """Floating-point operations per second of a square product."""
        elapsed_s = timed(lambda: self._left @ self._right, self._device)
        self.flops.append(2 * _GEMM_SIZE**3 / elapsed_s)
        return self.flops[-1]


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s
