"""The prefix index: whatever is lost, repeated or late, a snapshot makes it equal to the worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core import prefix_index
from baton.core.prefix_index import PrefixIndex


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def test_match_counts_leading_blocks_per_holder() -> None:
    index = PrefixIndex()
    assert not index.apply("a", 1, hashes(1, 2, 3), [])
    assert not index.apply("b", 1, hashes(1, 3), [])
    assert not index.apply("c", 1, hashes(2, 3), [])
    assert index.match(hashes(1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.match([]) == {}


def test_removed_blocks_shorten_the_match() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1, 2, 3), [])
    index.apply("a", 2, [], hashes(2))
    assert index.match(hashes(1, 2, 3)) == {"a": 1}
    index.apply("a", 3, hashes(2), hashes(1))
    assert index.match(hashes(1, 2, 3)) == {}
    assert index.num_blocks("a") == 2


def test_block_removed_and_stored_again_in_one_event_is_held() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1), hashes(1))
    assert index.match(hashes(1)) == {"a": 1}


def test_repeated_and_old_events_change_nothing() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1), [])
    index.apply("a", 2, [], hashes(1))
    assert not index.apply("a", 1, hashes(1), [])
    assert not index.apply("a", 2, hashes(1), [])
    assert index.match(hashes(1)) == {}


def test_missing_event_is_reported_until_a_snapshot_mends_it() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1), [])
    assert index.apply("a", 3, hashes(3), [])
    assert index.has_gap("a")
    assert index.apply("a", 4, hashes(4), []), "still missing event 2"
    assert not index.load_snapshot("a", 3, hashes(1, 2, 3))
    assert not index.has_gap("a")
    assert index.match(hashes(1, 2, 3, 4)) == {"a": 4}, "event 4 is kept on top of the snapshot"
    assert not index.apply("a", 5, [], hashes(1))


def test_first_event_of_a_late_observer_is_a_gap() -> None:
    index = PrefixIndex()
    assert index.apply("a", 7, hashes(7), [])
    assert index.match(hashes(7)) == {"a": 1}, "what is known is used meanwhile"


def test_snapshot_that_is_too_old_leaves_the_gap() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1), [])
    index.apply("a", 5, hashes(5), [])
    assert index.load_snapshot("a", 1, hashes(1)), "2 to 4 are still missing"
    assert index.load_snapshot("a", 3, hashes(1, 3))
    assert not index.load_snapshot("a", 4, hashes(1, 3, 4))
    assert index.num_blocks("a") == 4


def test_stale_snapshot_does_not_undo_later_events() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1), [])
    index.apply("a", 2, [], hashes(1))
    assert not index.load_snapshot("a", 1, hashes(1))
    assert index.match(hashes(1)) == {}


def test_pending_events_are_bounded_and_a_hole_among_them_needs_another_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_index, "_MAX_PENDING_EVENTS", 2)
    index = PrefixIndex()
    for sequence in (3, 4, 5):
        index.apply("a", sequence, hashes(sequence), [])
    assert index.load_snapshot("a", 2, hashes(1)), "event 3 was let go"
    assert not index.load_snapshot("a", 3, hashes(1, 3))
    assert index.num_blocks("a") == 4


def test_dropped_worker_is_forgotten() -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(1, 2), [])
    index.apply("b", 1, hashes(1), [])
    assert index.drop_worker("a") == 2
    assert index.drop_worker("a") == 0
    assert index.match(hashes(1)) == {"b": 1}
    assert index.worker_ids == {"b"}


NUMBERS = st.lists(st.integers(0, 12), max_size=4)
CHANGES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20)


def states_after(changes: list[tuple[list[int], list[int]]]) -> list[set[bytes]]:
    """The worker's true content after each event; index 0 is before the first."""
    states: list[set[bytes]] = [set()]
    for stored, removed in changes:
        states.append((states[-1] - set(hashes(*removed))) | set(hashes(*stored)))
    return states


@given(changes=CHANGES, data=st.data())
def test_index_equals_the_worker_whatever_was_lost(
    changes: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    states = states_after(changes)
    index = PrefixIndex()
    order = data.draw(st.lists(st.integers(1, len(changes)), max_size=2 * len(changes)))
    snapshots = data.draw(st.sets(st.integers(0, 2 * len(changes)), max_size=3))
    for step, sequence in enumerate(order):
        stored, removed = changes[sequence - 1]
        has_gap = index.apply("a", sequence, hashes(*stored), hashes(*removed))
        assert has_gap == index.has_gap("a")
        if step in snapshots:
            taken_at = data.draw(st.integers(0, len(changes)))
            index.load_snapshot("a", taken_at, states[taken_at])
    last = max(order, default=0)
    if index.has_gap("a"):
        assert not index.load_snapshot("a", last, states[last])
    elif index.num_blocks("a"):
        # Whole: equal to the worker after some event, at least as late as any event seen.
        held = {h for h in hashes(*range(13)) if index.match([h])}
        assert any(held == states[number] for number in range(last, len(states)))
    if index.load_snapshot("a", len(changes), states[-1]):
        pytest.fail("a snapshot after the last event leaves nothing missing")
    assert {h for h in hashes(*range(13)) if index.match([h])} == states[-1]


@given(held=st.sets(st.integers(0, 12)), asked=st.lists(st.integers(0, 12), max_size=12))
def test_match_is_the_longest_held_prefix(held: set[int], asked: list[int]) -> None:
    index = PrefixIndex()
    index.apply("a", 1, hashes(*held), [])
    expected = next((n for n, number in enumerate(asked) if number not in held), len(asked))
    assert index.match(hashes(*asked)).get("a", 0) == expected
