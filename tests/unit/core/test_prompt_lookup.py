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
