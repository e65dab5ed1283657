from __future__ import annotations

from baton.core.timeline import Slice
from baton.prefill.computed_chunks import ComputedChunks


def test_chunks_are_relative_to_the_start_and_leave_cached_tokens_out() -> None:
    progress = ComputedChunks(num_tokens=70, block_size=16)
    progress.started(at_s=10.0, num_cached_tokens=16)
    progress.computed(num_blocks=3, at_s=10.5)
    progress.computed(num_blocks=5, at_s=11.25)
    assert progress.chunks == (
        Slice(0.0, 0.5, num_tokens=32),
        Slice(0.5, 1.25, num_tokens=22),  # the last block is not full
    )


def test_no_chunks_before_the_first_one() -> None:
    assert ComputedChunks(num_tokens=70, block_size=16).chunks == ()
