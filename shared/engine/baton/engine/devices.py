"""Which device computes, and on how many threads."""

from __future__ import annotations

import logging
import os

import torch

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine.varlen import PAGE_TOKENS

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16


def check_device(name: str) -> torch.device:
    """The device of a name, which must be here.

    Raises:
        InvalidRequest: it is no device's name.
        Unsupported: it is not served, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device {name!r} is not a device; use cpu or cuda") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise Unsupported(f"device {name} is not supported; use cpu or cuda")
    if not torch.cuda.is_available():
        raise Unsupported(
            f"device {name}: this machine, or this build of torch, has no CUDA device; use cpu"
        )
    num_devices = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= num_devices:
        raise Unsupported(f"device {name}: this machine has {num_devices} CUDA devices")
    # With its index, so that no thread's current device decides.
    return torch.device("cuda", index)


def default_block_size(device: torch.device) -> int:
    """Tokens per KV block where no setting says it."""
    return PAGE_TOKENS if device.type == "cuda" else _BLOCK_SIZE


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
