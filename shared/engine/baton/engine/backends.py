"""Which attention backend each layer of a model gets, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from baton.core.errors import Unsupported
from baton.engine.attention import AttentionBackend, LayerShape
from baton.engine.sdpa import SdpaBackend
from baton.engine.varlen import VarlenBackend, find_kernel, why_not

logger = logging.getLogger(__name__)


def choose_backends(
    shapes: Sequence[LayerShape], device: torch.device, dtype: torch.dtype, block_size: int
) -> Mapping[int, AttentionBackend]:
    """`varlen` for the layers that it can compute here, `sdpa` for the others, by layer."""
    sdpa = SdpaBackend()
    try:
        varlen = VarlenBackend(find_kernel(device, dtype, block_size))
    except Unsupported as error:
        # On other devices nobody expects anything else.
        level = logging.INFO if device.type == "cuda" else logging.DEBUG
        logger.log(level, "attention: sdpa; not varlen: %s", error.message)
        return dict.fromkeys(range(len(shapes)), sdpa)
    reasons = [why_not(shape) for shape in shapes]
    for reason, count in Counter(reasons).items():
        if reason is None:
            logger.info("attention: varlen for %d of %d layers", count, len(shapes))
        else:
            logger.info("attention: sdpa for %d layers; not varlen: %s", count, reason)
    return {layer: varlen if reason is None else sdpa for layer, reason in enumerate(reasons)}
