from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from baton.core.handoff.frames import Span
from baton.core.handoff.outgoing import Outgoing
from baton.core.hashing import KvLayout

LAYOUT = KvLayout.one_group(
    block_size=4, dtype="float32", num_kv_heads=(2, 1, 2), head_dim=(4, 8, 4)
)
NUM_LAYERS = LAYOUT.num_layers


def _all(outgoing: Outgoing, limit: int = 1 << 20) -> list[Span]:
    return list(iter(lambda: outgoing.take(limit), None))


def _pieces(span: Span) -> itertools.product[tuple[int, ...]]:
    return itertools.product(
        range(span.layer_start, span.layer_end),
        range(span.block_start, span.block_start + span.num_blocks),
    )


@given(
    start=st.integers(0, 9),
    num=st.integers(0, 20),
    limit=st.integers(1, 5000),
    steps=st.lists(st.integers(1, 8), max_size=6),
    takes=st.lists(st.integers(0, 4)),
)
def test_every_block_of_every_layer_is_taken_once_and_only_when_it_is_ready(
    start: int, num: int, limit: int, steps: list[int], takes: list[int]
) -> None:
    outgoing = Outgoing(LAYOUT, start, start + num)
    complete: set[tuple[int, ...]] = set()
    taken: list[tuple[int, ...]] = []
    numbers = iter(takes)

    def take(limit_spans: int | None) -> None:
        for span in itertools.islice(iter(lambda: outgoing.take(limit), None), limit_spans):
            is_smallest = span.num_blocks == 1 and span.layer_end == span.layer_start + 1
            assert span.num_bytes(LAYOUT) <= limit or is_smallest
            pieces = list(_pieces(span))
            assert complete.issuperset(pieces)
            taken.extend(pieces)

    num_done = 0
    for num_blocks in [*steps, 29]:
        begun = range(num_done, num_done + num_blocks)
        for layer in range(NUM_LAYERS):
            complete |= {(layer, block) for block in begun}
            if layer != 1:  # a group of two layers, then one of one
                outgoing.layers_ready(begun.stop, layer + 1)
            take(next(numbers, 0))
        outgoing.blocks_ready(begun.stop)
        num_done = begun.stop
        take(next(numbers, 0))
    take(None)
    assert outgoing.is_empty
    assert sorted(taken) == list(itertools.product(range(NUM_LAYERS), range(start, start + num)))


def test_layers_go_out_before_their_blocks_are_complete() -> None:
    outgoing = Outgoing(LAYOUT, 0, 5)
    assert outgoing.take(1) is None
    outgoing.layers_ready(4, 2)
    assert _all(outgoing) == [Span(0, 2, 0, 4)]
    outgoing.blocks_ready(4)
    assert _all(outgoing) == [Span(2, 3, 0, 4)]
    assert not outgoing.is_empty
    outgoing.blocks_ready(5)
    assert _all(outgoing) == [Span(0, 3, 4, 1)]
    assert outgoing.is_empty


def test_a_layer_larger_than_a_piece_is_cut_and_the_next_layer_waits_for_none() -> None:
    layer_bytes = LAYOUT.layers_block_bytes(0, 1)
    outgoing = Outgoing(LAYOUT, 0, 5)
    outgoing.layers_ready(5, 1)
    assert _all(outgoing, 2 * layer_bytes) == [Span(0, 1, 0, 2), Span(0, 1, 2, 2), Span(0, 1, 4, 1)]
    outgoing.layers_ready(5, 2)
    assert _all(outgoing, 2 * layer_bytes)[0] == Span(1, 2, 0, 2)


def test_a_layer_that_was_begun_is_ended_whatever_the_size_of_a_piece() -> None:
    outgoing = Outgoing(LAYOUT, 0, 5)
    outgoing.blocks_ready(5)
    assert outgoing.take(1) == Span(0, 1, 0, 1)
    assert _all(outgoing) == [Span(0, 1, 1, 4), Span(1, 3, 0, 5)]


def test_pieces_are_wide() -> None:
    outgoing = Outgoing(LAYOUT, 0, 8)
    outgoing.blocks_ready(8)
    assert _all(outgoing, 8 * LAYOUT.layers_block_bytes(0, 2)) == [
        Span(0, 2, 0, 8),
        Span(2, 3, 0, 8),
    ]
