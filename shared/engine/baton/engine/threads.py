"""How many threads compute: what the settings say, or as many as there are cores to run them."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(num_threads: int | None) -> int:
    """Sets torch's threads, and warns when they are more than the cores given to this process.

    Returns:
        Threads that compute from now on. Without a setting never more than cores.
    """
    cores = num_cores()
    wanted = min(torch.get_num_threads(), cores) if num_threads is None else num_threads
    torch.set_num_threads(wanted)
    if wanted > cores:
        logger.warning(
            "%d threads compute on %d cores: spinning threads starve each other, and steps take "
            "5 to 10 times longer; set num_threads to %d, or give this worker more cores",
            wanted,
            cores,
            cores,
        )
    return wanted
