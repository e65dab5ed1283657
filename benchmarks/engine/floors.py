"""What this machine can do at most, measured in the same run: nothing here knows the engine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_READ_BYTES = 1 << 30
_GEMM_SIZE = 2048
_CUDA_SCALE = 4
"""A GPU takes so many times the bytes and the rows, and repeats, to hide the launches."""
_CUDA_REPEATS = 8


class Floors:
    """Read bandwidth and matrix product rate of the threads that torch has.

    Both move with what else runs on the machine, so they are measured again right beside every
    step that is compared with them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        scale = _CUDA_SCALE if device.type == "cuda" else 1
        self._size = _GEMM_SIZE * scale
        self._big = torch.ones(_READ_BYTES * scale // 4, dtype=torch.float32, device=device)
        self._left = torch.randn(self._size, self._size, device=device).to(dtype)
        self._right = torch.randn(self._size, self._size, device=device).to(dtype)
        self.bytes_per_s: list[float] = []
        """Every measurement."""
        self.flops: list[float] = []
        """Every measurement, per second."""

    def measure_read(self) -> float:
        """Bytes per second of one pass over 1 GiB, on a GPU 4 GiB."""
        rate = self._big.nbytes / repeated(self._big.sum, self._device)
        self.bytes_per_s.append(rate)
        return rate

    def measure_gemm(self) -> float:
        """Floating-point operations per second of a square product."""
        elapsed_s = repeated(lambda: self._left @ self._right, self._device)
        self.flops.append(2 * self._size**3 / elapsed_s)
        return self.flops[-1]


def repeated(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes on the device: of several in a row, by CUDA's own clock."""
    if device.type != "cuda":
        return timed(function, device)
    function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_CUDA_REPEATS):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _CUDA_REPEATS


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s
