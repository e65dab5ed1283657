"""Kept answers: bounded in time and bytes, and never other than what was kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cache.answers import ANSWER_OVERHEAD_BYTES, AnswerStore
from baton.core.errors import InvalidRequest

TTL_S = 10.0
COST_BYTES = 100 + ANSWER_OVERHEAD_BYTES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def answer(number: int) -> bytes:
    return bytes([number]) * 100


def make_store(clock: Clock, answers: int = 3) -> AnswerStore:
    return AnswerStore(answers * COST_BYTES, TTL_S, clock)


def test_answer_comes_back_until_its_time_is_over(clock: Clock) -> None:
    store = make_store(clock)
    assert store.get(key(1)) is None
    assert store.put(key(1), answer(1))
    clock.now = TTL_S - 0.1
    assert store.get(key(1)) == answer(1)
    clock.now = TTL_S
    assert store.get(key(1)) is None
    assert store.used_bytes == 0
    counters = store.counters
    assert (counters.num_hits, counters.num_misses, counters.num_expired) == (1, 2, 1)


def test_kept_again_an_answer_lasts_from_then_on(clock: Clock) -> None:
    store = make_store(clock)
    store.put(key(1), answer(1))
    clock.now = 6.0
    store.put(key(1), answer(2))
    clock.now = 12.0
    assert store.get(key(1)) == answer(2)
    assert store.used_bytes == COST_BYTES


def test_least_recently_used_goes_first(clock: Clock) -> None:
    store = make_store(clock)
    for number in (1, 2, 3):
        store.put(key(number), answer(number))
    store.get(key(1))
    store.put(key(4), answer(4))
    assert [number for number in (1, 2, 3, 4) if store.get(key(number))] == [1, 3, 4]
    assert store.counters.num_evicted == 1


def test_answer_larger_than_the_budget_is_not_kept(clock: Clock) -> None:
    store = make_store(clock)
    store.put(key(1), answer(1))
    assert not store.put(key(2), bytes(4 * COST_BYTES))
    assert store.get(key(1)) == answer(1)
    assert not make_store(clock, 0).put(key(1), answer(1))


def test_changed_answer_is_dropped(clock: Clock) -> None:
    store = make_store(clock)
    store.put(key(1), answer(1))
    store._kept[key(1)] = store._kept[key(1)].__class__(
        answer(2), store._kept[key(1)].checksum, TTL_S
    )
    assert store.get(key(1)) is None
    assert store.counters.num_corrupt == 1


def test_bad_keys_and_empty_answers_are_refused(clock: Clock) -> None:
    store = make_store(clock)
    with pytest.raises(InvalidRequest, match="32 bytes"):
        store.get(b"short")
    with pytest.raises(InvalidRequest, match="empty"):
        store.put(key(1), b"")


@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 200), st.floats(0, 4)), max_size=80)
)
def test_budget_holds_and_nothing_old_or_wrong_comes_back(
    steps: list[tuple[int, int, float]],
) -> None:
    clock = Clock()
    store = make_store(clock)
    put: dict[int, tuple[float, bytes]] = {}
    for number, size, wait_s in steps:
        clock.now += wait_s
        found = store.get(key(number))
        if found is not None:
            at_s, content = put[number]
            assert found == content
            assert clock.now < at_s + TTL_S
        content = bytes([number]) * size
        if store.put(key(number), content):
            put[number] = (clock.now, content)
        assert store.used_bytes == sum(kept.cost_bytes for kept in store._kept.values())
        assert store.used_bytes <= store.budget_bytes
        assert len(store._ends) <= 2 * len(store) + 64
