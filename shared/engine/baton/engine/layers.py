"""Tells, while a step computes, which layers of its prompts' KV can be read already.

A layer's KV is final once the layer's attention has written it: the step goes on to other layers.
So a prompt that fits one step is on its way before its first token is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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


class LayerNews:
    """One step's layers. Only the engine thread calls it."""

    def __init__(
        self, state: EngineState, completed: Sequence[Completed], num_layers: int, group: int
    ) -> None:
        """Tells after every `group` layers."""
        self._state = state
        self._completed = completed
        self._num_layers = num_layers
        self._group = group
        self._num_written = 0

    def __call__(self, layer: int) -> None:
        """The step has written a layer's KV."""
        if layer != self._num_written:
            return  # Not in order: only what comes with the end of the step is told.
        self._num_written += 1
        if self._num_written % self._group and self._num_written < self._num_layers:
            return
        now = time.monotonic()
        with self._state.lock:
            self._state.outbox += [
                LayersReady(entry.sequence.seq_id, entry.num_blocks, self._num_written, now)
                for entry in self._completed
                if not entry.sequence.is_released
            ]
        self._state.deliver()


def layer_news(
    state: EngineState, completed: Sequence[Completed], layout: KvLayout
) -> LayerNews | None:
    """News of a step in groups of layers with about `layer_group_bytes` of KV.

    None if the step's KV is not more than one group.
    """
    group_bytes = state.config.layer_group_bytes
    completed = [entry for entry in completed if entry.num_blocks > entry.num_before]
    num_bytes = layout.block_bytes * sum(entry.num_blocks - entry.num_before for entry in completed)
    if group_bytes is None or num_bytes <= group_bytes:
        return None
    group = -(-layout.num_layers * group_bytes // num_bytes)
    return LayerNews(state, completed, layout.num_layers, group)
