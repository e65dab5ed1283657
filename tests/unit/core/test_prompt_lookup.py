from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.core.prompt_lookup import NgramIndex


def test_it_says_what_followed_the_same_tokens() -> None:
    assert NgramIndex().drafts([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == [4, 5, 6]
    assert NgramIndex().drafts([9, 2, 3, 7, 1, 2, 3], 2) == [7, 1], "two tokens are enough"
    assert NgramIndex().drafts([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == [5], "the latest place"
    assert NgramIndex().drafts([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1) == [9], "the longest match"
    assert NgramIndex().drafts([1, 2, 3, 4], 3) == []
    assert NgramIndex().drafts([1], 3) == []


def test_a_repetition_goes_on() -> None:
    assert NgramIndex().drafts([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert NgramIndex().drafts([5, 5, 5], 4) == [5, 5, 5, 5]


@given(token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=60), step=st.integers(1, 5))
def test_growing_with_the_sequence_changes_nothing(token_ids: list[int], step: int) -> None:
    growing = NgramIndex()
    for end in range(1, len(token_ids), step):
        growing.drafts(token_ids[:end], 1)
    assert growing.drafts(token_ids, 4) == NgramIndex().drafts(token_ids, 4)


def test_a_long_prompt_is_indexed_in_parts_and_within_a_bound() -> None:
    index, token_ids = NgramIndex(), list(range(100_000, 160_000))
    index.drafts(token_ids, 4)
    assert len(index._ends) <= 2 * 512
    for token_id in range(300_000, 340_000):
        token_ids.append(token_id)
        index.drafts(token_ids, 1)
        assert len(index._ends) <= 4 * 8192 + 2 * 512
    assert index.drafts([*token_ids, *token_ids[-1000:-990]], 3) == token_ids[-990:-987]
