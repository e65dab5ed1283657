"""In which pieces one request's KV goes out, while it is computed."""

from __future__ import annotations

from baton.core.handoff.frames import Span
from baton.core.hashing import KvLayout


class Outgoing:
    """Blocks `[block_start, block_end)` of a request, each byte of which is taken once.

    The computation completes blocks in order; of the blocks that its step is about to complete it
    completes layers in order. Pieces are wide: many blocks of few layers, which are fewer and
    larger copies on both sides than few blocks of all layers.
    """

    def __init__(self, layout: KvLayout, block_start: int, block_end: int) -> None:
        self._layout = layout
        self._block_end = block_end
        self._num_ready = 0
        self._num_begun = 0
        """Blocks whose first `_layer_end` layers are complete."""
        self._layer_end = 0
        self._row_start = block_start
        """Blocks before it have been taken."""
        self._row_end = block_start
        """Blocks from `_row_start` to here are being taken, layer by layer."""
        self._layer = 0
        """Layers of the row before it have been taken."""
        self._block = block_start
        """Blocks of this layer before it have been taken."""

    @property
    def is_empty(self) -> bool:
        """True when all has been taken."""
        return self._row_start >= self._block_end

    def blocks_ready(self, num_blocks: int) -> None:
        """The first `num_blocks` blocks are complete."""
        self._num_ready = min(self._block_end, max(self._num_ready, num_blocks))

    def layers_ready(self, num_blocks: int, layer_end: int) -> None:
        """Of the first `num_blocks` blocks, the layers before `layer_end` are complete."""
        self._num_begun = min(self._block_end, num_blocks)
        self._layer_end = layer_end

    def take(self, max_chunk_bytes: int) -> Span | None:
        """The next piece, or None while there is nothing to be taken.

        It has at most `max_chunk_bytes`, as far as one block of one layer allows.
        """
        if self._row_start == self._row_end:
            self._begin_row()
        num_blocks = self._row_end - self._row_start
        is_ready = self._num_ready >= self._row_end
        layer_end = self._layout.num_layers if is_ready else self._layer_end
        if not num_blocks or self._layer >= layer_end:
            return None
        span = self._cut(num_blocks, layer_end, max_chunk_bytes)
        self._layer, self._block = span.layer_end, self._row_start
        if span.block_start + span.num_blocks < self._row_end:
            self._layer, self._block = span.layer_start, span.block_start + span.num_blocks
        if self._layer == self._layout.num_layers:
            self._row_start = self._block = self._row_end
            self._layer = 0
        return span

    def _begin_row(self) -> None:
        if self._num_ready > self._row_start:
            self._row_end = self._num_ready
        elif self._num_begun > self._row_start:
            self._row_end = self._num_begun

    def _cut(self, num_blocks: int, layer_end: int, max_bytes: int) -> Span:
        layout, layer = self._layout, self._layer
        room = max_bytes // layout.layers_block_bytes(layer, layer + 1)
        if room < num_blocks or self._block > self._row_start:
            end = min(self._row_end, self._block + max(1, room))
            return Span(layer, layer + 1, self._block, end - self._block)
        while layout.layers_block_bytes(layer, layer_end) * num_blocks > max_bytes:
            layer_end -= 1
        return Span(layer, layer_end, self._row_start, num_blocks)
