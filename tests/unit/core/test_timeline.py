from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.timeline import Slice, Slices

PARTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=300)


@given(PARTS, st.sampled_from([2, 4, 64]))
def test_many_parts_fit_and_nothing_is_lost(parts: list[tuple[int, int]], limit: int) -> None:
    slices = Slices(limit)
    for index, (tokens, num_bytes) in enumerate(parts):
        slices.add(Slice(index, index + 1, num_tokens=tokens, num_bytes=num_bytes))
    found = list(slices)
    assert len(found) == len(slices) <= limit
    assert sum(one.num_parts for one in found) == len(parts)
    assert sum(one.num_tokens for one in found) == sum(tokens for tokens, _ in parts)
    assert sum(one.num_bytes for one in found) == sum(size for _, size in parts)
    assert [one.start_s for one in found[1:]] == [one.end_s for one in found[:-1]]
    assert len({one.num_parts for one in found[:-1]}) <= 1


def test_few_parts_stay_as_they_are() -> None:
    slices = Slices()
    for index in range(64):
        slices.add(Slice(index, index + 0.5, draft_tokens=2, accepted_tokens=1))
    assert [one.num_parts for one in slices] == [1] * 64
    slices.add(Slice(64, 65))
    assert [one.num_parts for one in slices] == [2] * 32 + [1]
    assert next(iter(slices)) == Slice(0, 1.5, 2, draft_tokens=4, accepted_tokens=2)


def test_shifted_moves_both_ends() -> None:
    assert Slice(1.0, 2.0, 3, 4, 5, 6, 7).shifted(0.5) == Slice(1.5, 2.5, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limit_must_be_even(limit: int) -> None:
    with pytest.raises(ValueError, match="even"):
        Slices(limit)
