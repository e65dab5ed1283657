from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.embedding import Pooling, pooling_of, shaped
from baton.core.errors import InvalidRequest

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=8).filter(lambda v: math.hypot(*v) > 1e-3))
def test_a_scaled_vector_has_length_1_and_the_same_direction(vector):
    result = shaped(vector)
    assert math.hypot(*result) == pytest.approx(1.0)
    assert sum(a * b for a, b in zip(result, vector, strict=True)) == pytest.approx(
        math.hypot(*vector)
    )


def test_leading_values_are_kept_and_then_scaled():
    assert shaped([3.0, 4.0, 12.0], 2) == pytest.approx((0.6, 0.8))
    assert shaped([3.0, 4.0, 12.0], 2, is_scaled=False) == (3.0, 4.0)
    assert shaped([0.0, 0.0]) == (0.0, 0.0)


def test_more_values_than_there_are_cannot_be_kept():
    with pytest.raises(InvalidRequest, match="dimensions must be at most 2"):
        shaped([1.0, 2.0], 3)


def test_poolings_have_the_contracts_numbers():
    assert [pooling_of(number) for number in (0, 1, 2)] == [
        Pooling.LAST,
        Pooling.LAST,
        Pooling.MEAN,
    ]
    with pytest.raises(InvalidRequest, match="pooling"):
        pooling_of(3)
