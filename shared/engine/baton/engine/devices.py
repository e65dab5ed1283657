"""Which device computes."""

from __future__ import annotations

import torch

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine.varlen import PAGE_TOKENS

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
