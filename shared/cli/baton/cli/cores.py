"""Which cores each worker of this machine gets.

Two workers whose threads share cores run several times slower than with their own (measured:
spinning OpenMP threads starve each other), so every worker is pinned, and counts its threads by its
cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def available_cores() -> tuple[int, ...]:
    """Cores that this process may use; without a way to ask, all that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def divide_cores(cores: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """A share of the cores for each worker: neighbours together, the first ones get the rest.

    With fewer cores than workers they take one core each in turn, and share.
    """
    if num_workers >= len(cores):
        return [(cores[index % len(cores)],) for index in range(num_workers)]
    size, num_larger = divmod(len(cores), max(1, num_workers))
    remaining = iter(cores)
    return [tuple(islice(remaining, size + (index < num_larger))) for index in range(num_workers)]


def thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that numeric libraries read once, when they are loaded."""
    return {name: str(num_threads) for name in _THREAD_VARIABLES}
