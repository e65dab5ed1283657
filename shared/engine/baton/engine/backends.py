"""Which attention backend each layer of a model gets, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from baton.core.errors import Unsupported
from baton.engine import paged
from baton.engine.attention import AttentionBackend, LayerShape
from baton.engine.paged import PagedBackend
from baton.engine.sdpa import SdpaBackend
from baton.engine.varlen import VarlenBackend, find_kernel, why_not

logger = logging.getLogger(__name__)


def choose_backends(
    shapes: Sequence[LayerShape],
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    *,
    kv_dtype: torch.dtype | None = None,
) -> Mapping[int, AttentionBackend]:
    """`varlen` or `paged` for the layers that it can compute here, `sdpa` for the others, by layer.

    Args:
        shapes: what each layer asks for.
        device: where it computes.
        dtype: of queries.
        block_size: tokens in a block.
        kv_dtype: of keys and values, where it is another than `dtype`.
    """
    sdpa = SdpaBackend()
    try:
        kernel, reasons = _kernel(shapes, device, dtype, block_size, kv_dtype or dtype)
    except Unsupported as error:
        # A CPU without kernels is the usual case, and no reason to alarm an operator.
        level = logging.INFO if device.type == "cuda" else logging.DEBUG
        name = PagedBackend.name if device.type == "cpu" else VarlenBackend.name
        logger.log(level, "attention: sdpa; not %s: %s", name, error.message)
        return dict.fromkeys(range(len(shapes)), sdpa)
    for reason, count in Counter(reasons).items():
        if reason is None:
            logger.info("attention: %s for %d of %d layers", kernel.name, count, len(shapes))
        else:
            logger.info("attention: sdpa for %d layers; not %s: %s", count, kernel.name, reason)
    return {layer: kernel if reason is None else sdpa for layer, reason in enumerate(reasons)}


def _kernel(
    shapes: Sequence[LayerShape],
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    kv_dtype: torch.dtype,
) -> tuple[AttentionBackend, list[str | None]]:
    """The device's own kernel, and why not for each layer.

    Raises:
        Unsupported: it has none; the message says why.
    """
    try:
        kernel = VarlenBackend(find_kernel(device, kv_dtype, block_size))
    except Unsupported:
        if device.type != "cpu":
            raise
        return PagedBackend(), [paged.why_not(shape, dtype) for shape in shapes]
    return kernel, [why_not(shape) for shape in shapes]
