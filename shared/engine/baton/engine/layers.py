"""Reports, while a step computes, which layers of its prompts' KV can be read already.

A layer's KV is final once the layer's attention has written it: the step goes on to other layers.
So a prompt that fits one step is on its way before its first token is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from baton.core.hashing import KvLayout
from baton.engine.events import LayersReady
from baton.engine.state import EngineState
from baton.engine.step_entry import StepEntry


def layer_news(
    state: EngineState, prompts: Sequence[StepEntry], layout: KvLayout
) -> Callable[[int], None] | None:
    """Reports a step's layers in groups of about `layer_group_bytes` of KV.

    Returns:
        A function that the engine thread calls with each layer whose KV the step has written.
        None if the step's KV is not more than one group.
    """
    group_bytes = state.config.layer_group_bytes
    size = layout.block_size
    # The step pins its sequences: their blocks stay theirs until it ends.
    blocks = [(e.sequence, e.item.start // size, e.num_complete_blocks(size)) for e in prompts]
    num_bytes = layout.block_bytes * sum(end - start for _, start, end in blocks)
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
                LayersReady(sequence.seq_id, end, num_written, now)
                for sequence, start, end in blocks
                if end > start and not sequence.is_released
            ]
        state.deliver()

    return on_written
