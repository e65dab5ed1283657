from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.rate_limit import TokenBucket


def test_a_burst_then_the_rate():
    bucket = TokenBucket(rate_per_s=2.0, burst=3)
    assert [bucket.take(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0.0
    assert bucket.take(10.5) == 0.5
    assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5], "no more than a burst"


def test_a_clock_that_goes_back_gives_nothing():
    bucket = TokenBucket(rate_per_s=1.0, burst=1)
    assert bucket.take(10.0) == 0.0
    assert bucket.take(5.0) == 1.0
    assert bucket.take(10.5) == 0.5


@pytest.mark.parametrize(("rate_per_s", "burst"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1, 0)])
def test_what_lets_nothing_through_is_refused(rate_per_s, burst):
    with pytest.raises(ValueError, match="rate"):
        TokenBucket(rate_per_s, burst)


@given(
    st.floats(0.1, 100.0),
    st.integers(1, 20),
    st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60),
)
def test_never_more_than_allowed_and_the_delay_is_right(rate_per_s, burst, gaps_s):
    bucket, now, taken = TokenBucket(rate_per_s, burst), 0.0, 0
    for gap_s in gaps_s:
        now += gap_s
        delay_s = bucket.take(now)
        taken += delay_s == 0.0
        assert taken <= burst + rate_per_s * now + 1e-6
        if delay_s:
            now += delay_s + 1e-9
            assert bucket.take(now) == 0.0
            taken += 1
