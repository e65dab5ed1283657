from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.drafting import Acceptance, DraftCosts, LinearCost, best_length


def _rate(acceptance: float, plain: float, per_draft: float, length: int) -> float:
    return sum(acceptance**k for k in range(length + 1)) / (plain + length * per_draft)


@given(
    acceptance=st.floats(0, 1),
    plain=st.floats(0.01, 10),
    per_draft=st.floats(0, 10),
    max_length=st.integers(0, 16),
)
def test_no_other_length_gives_more_tokens_per_cost(
    acceptance: float, plain: float, per_draft: float, max_length: int
) -> None:
    found = best_length(acceptance, plain, per_draft, max_length)
    rates = [_rate(acceptance, plain, per_draft, length) for length in range(max_length + 1)]
    assert 0 <= found <= max_length
    assert rates[found] >= max(rates) * (1 - 1e-6)


@pytest.mark.parametrize(
    ("acceptance", "per_draft", "length"),
    [(0.0, 0.1, 0), (0.5, 0.6, 0), (0.5, 0.3, 1), (0.8, 0.2, 4), (1.0, 0.2, 8), (1.0, 1.0, 0)],
)
def test_better_and_cheaper_drafts_are_longer(
    acceptance: float, per_draft: float, length: int
) -> None:
    assert best_length(acceptance, 1.0, per_draft, 8) == length


@given(base=st.floats(0.0, 10), per_row=st.floats(0.001, 1), rows=st.lists(st.integers(1, 64)))
def test_costs_are_fitted(base: float, per_row: float, rows: list[int]) -> None:
    cost = LinearCost()
    for num_rows in [1, 9, *rows]:
        cost.observe(num_rows, base + per_row * num_rows)
    assert cost.fit() == pytest.approx((base, per_row), rel=1e-3, abs=1e-3)


def test_costs_that_fall_with_rows_or_never_vary_are_not_extrapolated() -> None:
    falling, constant = LinearCost(), LinearCost()
    for num_rows in (1, 2, 3):
        falling.observe(num_rows, 4.0 - num_rows)
        constant.observe(5, 2.0)
    assert falling.fit() == pytest.approx((2.0, 0.0), abs=0.1)
    assert constant.fit() == pytest.approx((2.0, 0.0))


def _costs(draft_s: float) -> DraftCosts:
    costs = DraftCosts()
    for num_rows in (1, 4, 16, 64):
        costs.target.observe(num_rows, 0.030 + 0.001 * num_rows)
        costs.draft.observe(num_rows, draft_s + 0.0001 * num_rows)
    return costs


def test_drafts_end_where_the_batch_is_large() -> None:
    costs = _costs(0.004)
    lengths = [
        best_length(0.7, *costs.per_sequence(num_seqs, is_draft_free=False), 8)
        for num_seqs in (1, 4, 16, 64, 256)
    ]
    assert lengths[0] >= 2
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0
    plain, per_draft = costs.per_sequence(1, is_draft_free=True)
    assert best_length(0.7, plain, per_draft, 8) > lengths[0], "looked up, they cost less"


def test_a_sequence_learns_how_good_its_drafts_are() -> None:
    good, bad = Acceptance(), Acceptance()
    for _ in range(40):
        good.observe(4, 4)
        bad.observe(4, 0)
    assert good.share > 0.95
    assert bad.share < 0.05
    assert good.next_length(1.0, 0.2, 8) == 8
    assert bad.next_length(1.0, 0.2, 8) == 0


def test_what_comes_behind_a_rejected_draft_tells_nothing() -> None:
    one, other = Acceptance(), Acceptance()
    one.observe(2, 1)
    other.observe(8, 1)
    assert one.share == other.share


def test_bad_drafts_are_tried_again_now_and_then() -> None:
    acceptance = Acceptance(share=0.01)
    lengths = [acceptance.next_length(1.0, 0.2, 4) for _ in range(31)]
    assert not any(lengths)
    assert acceptance.next_length(1.0, 0.2, 4) == 1
    acceptance.observe(1, 0)
    assert acceptance.next_length(1.0, 0.2, 4) == 0
    never = Acceptance(share=0.01)
    assert not any(never.next_length(1.0, 1.5, 4) for _ in range(100)), "they could not pay"
    assert not any(never.next_length(1.0, 0.1, 0) for _ in range(100))
