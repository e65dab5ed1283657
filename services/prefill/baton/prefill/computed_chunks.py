"""The chunks that a prompt was computed in, and when."""

from __future__ import annotations

from baton.core.timeline import Slice, Slices


class ComputedChunks:
    """The chunks of one prompt, relative to the moment at which it left the queue."""

    def __init__(self, num_tokens: int, block_size: int) -> None:
        self._num_tokens = num_tokens
        self._block_size = block_size
        self._started_at_s = 0.0
        self._chunk_at_s = 0.0
        self._num_computed = 0
        self._chunks = Slices()

    @property
    def chunks(self) -> tuple[Slice, ...]:
        """The chunks so far."""
        return tuple(self._chunks)

    def started(self, at_s: float, num_cached_tokens: int) -> None:
        """The prompt left the queue."""
        self._started_at_s = self._chunk_at_s = at_s
        self._num_computed = num_cached_tokens

    def computed(self, num_blocks: int, at_s: float) -> None:
        """The first `num_blocks` blocks are computed."""
        num_computed = min(num_blocks * self._block_size, self._num_tokens)
        self._chunks.add(
            Slice(
                start_s=self._chunk_at_s - self._started_at_s,
                end_s=at_s - self._started_at_s,
                num_tokens=max(0, num_computed - self._num_computed),
            )
        )
        self._chunk_at_s, self._num_computed = at_s, num_computed
