"""Reports, while a step computes, which layers of its prompts' KV can be read already.

A layer's KV is final once the layer's attention has written it: the step goes on to other layers.
So a prompt that fits one step is on its way before its first token is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.hashing import KvLayout
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.events import LayersReady
from baton.engine.state import EngineState


@dataclass(frozen=True, slots=True)
class Completed:
    """What the step under way does to one prompt's blocks."""

    sequence: TokenSequence
    """It is pinned by the step: its blocks stay its own until the step ends."""
    num_before: int
    """Blocks that were complete before."""
    num_blocks: int
    """Blocks that will be."""


def layer_news(
    state: EngineState, completed: Sequence[Completed], layout: KvLayout
) -> Callable[[int], None] | None:
    """Reports a step's layers in groups of about `layer_group_bytes` of KV.

    Returns:
        A function that the engine thread calls with each layer whose KV the step has written.
        None if the step's KV is not more than one group.
    """
    group_bytes = state.config.layer_group_bytes
    completed = [entry for entry in completed if entry.num_blocks > entry.num_before]
    num_bytes = layout.block_bytes * sum(entry.num_blocks - entry.num_before for entry in completed)
    if group_bytes is None or num_bytes <= group_bytes:
        return None
    group = -(-layout.num_layers * group_bytes // num_bytes)
    num_written = 0

    def on_written(layer: int) -> None:
        nonlocal num_written
        if layer != num_written:
            return  # Out of order: readers learn of these layers when the step ends.
        num_written += 1
        if num_written % group and num_written < layout.num_layers:
            return
        now = time.monotonic()
        with state.lock:
            state.outbox += [
                LayersReady(entry.sequence.seq_id, entry.num_blocks, num_written, now)
                for entry in completed
                if not entry.sequence.is_released
            ]
        state.deliver()

    return on_written
