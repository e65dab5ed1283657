from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.draft_policy import (
    Acceptance,
    CostTable,
    DraftCandidate,
    DraftPolicy,
    TypicalAcceptance,
)


def _measure(table: CostTable, cost: Callable[[float], float], rows: list[int], step: int) -> None:
    for num_rows in rows * 3:
        table.observe(num_rows, cost(num_rows), step)


@pytest.mark.parametrize(
    "cost", [lambda r: 1.0 + 0.1 * r, lambda r: max(1.0, r / 8), lambda r: float(math.ceil(r / 16))]
)
def test_costs_of_any_shape_are_known_where_they_were_measured(
    cost: Callable[[float], float],
) -> None:
    table, rows = CostTable(), [1, 2, 3, 4, 5, 16, 32, 48, 64]
    _measure(table, cost, rows, step=1)
    for num_rows in rows:
        assert table.estimate(num_rows, 1) == pytest.approx(cost(num_rows), rel=0.15)


def test_what_was_not_measured_is_taken_to_be_as_cheap_as_it_could_be() -> None:
    table = CostTable()
    assert table.estimate(3, 0) is None
    table.observe(16, 99.0, 1)
    assert table.estimate(16, 1) is None, "the first forward of a size sets things up"
    _measure(table, lambda _: 4.0, [16], step=1)
    fresh = table.estimate(16, 1)
    assert fresh == pytest.approx(4.0, rel=0.1)
    assert table.estimate(64, 1) == fresh, "more rows may be free"
    assert table.estimate(4, 1) == pytest.approx(fresh / 4), "fewer may cost in proportion"
    _measure(table, lambda _: 8.0, [64], step=1)
    assert table.estimate(32, 1) == fresh, "between far ones nothing is known"
    assert table.estimate(16, 400) < 0.5 * fresh, "long ago is not known any more"


def test_one_disturbed_forward_hardly_counts() -> None:
    table = CostTable()
    _measure(table, lambda _: 1.0, [4] * 3, step=1)
    calm = table.estimate(4, 1)
    table.observe(4, 50.0, 1)
    assert table.estimate(4, 1) < 1.1 * calm
    disturbed = CostTable()
    for cost in (1.0, 50.0, 1.0, 1.0):
        disturbed.observe(4, cost, 1)
    assert disturbed.estimate(4, 1) < 1.3


@given(
    measured=st.lists(
        st.tuples(st.integers(1, 200), st.floats(0.01, 100.0), st.integers(0, 300)), min_size=1
    )
)
def test_more_rows_never_cost_less(measured: list[tuple[int, float, int]]) -> None:
    table = CostTable()
    for rows, cost, step in sorted(measured, key=lambda one: one[2]):
        table.observe(rows, cost, step)
        table.observe(rows, cost, step)
    found = [table.estimate(rows, 301) or 0.0 for rows in range(1, 201)]
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(found))


def test_a_sequence_learns_how_good_its_drafts_are_and_others_start_from_that() -> None:
    typical = TypicalAcceptance()
    good, bad = Acceptance(typical), Acceptance(typical)
    for _ in range(60):
        good.observe(4, 4)
        bad.observe(4, 0)
    assert good.survivals(1)[0] > bad.survivals(1)[0] + 0.3
    middle = Acceptance(typical).survivals(1)[0]
    assert bad.survivals(1)[0] < middle < good.survivals(1)[0]
    for _ in range(300):
        good.rest()
    assert good.survivals(1)[0] == pytest.approx(middle, abs=0.05), "what it knew has aged"


def test_what_comes_behind_a_rejected_draft_tells_nothing() -> None:
    found = []
    for num_proposed in (2, 8):
        acceptance = Acceptance(TypicalAcceptance())
        acceptance.observe(num_proposed, 1)
        found.append(acceptance.survivals(1))
    assert found[0] == found[1]


def test_acceptance_is_known_by_depth() -> None:
    """Of looked up drafts the first is the doubtful one."""
    typical = TypicalAcceptance()
    acceptance = Acceptance(typical)
    for index in range(400):
        acceptance.observe(4, 4 * (index % 2))
    first, *_, last = acceptance.survivals(4)
    assert first == pytest.approx(0.5, abs=0.1)
    assert last > 0.8 * first


def _policy(target: Callable[[float], float], draft: float) -> DraftPolicy:
    policy = DraftPolicy()
    for _ in range(3):
        for rows in (1, 2, 3, 4, 5, 16, 32, 48, 64, 80):
            policy.observe_target(rows, target(rows))
            policy.observe_draft(rows, draft)
    return policy


def _candidates(num: int, *, is_free: bool = False, most: int = 4) -> list[DraftCandidate]:
    typical = TypicalAcceptance()
    return [DraftCandidate(Acceptance(typical), most, is_free=is_free) for _ in range(num)]


def test_drafts_end_where_the_batch_is_large() -> None:
    policy = _policy(lambda rows: max(1.0, rows / 8), 0.1)
    assert policy.lengths(1, _candidates(1))[0] >= 3
    assert set(policy.lengths(16, _candidates(16))) == {0}


def test_looked_up_drafts_are_longer_than_those_that_cost() -> None:
    policy = _policy(lambda rows: 1.0 + 0.02 * rows, 0.6)
    (modelled,) = policy.lengths(1, _candidates(1))
    (looked_up,) = policy.lengths(1, _candidates(1, is_free=True))
    assert modelled < looked_up == 4


def test_no_sequence_gets_more_than_it_may() -> None:
    policy = _policy(lambda _: 1.0, 0.0)
    typical = TypicalAcceptance()
    candidates = [DraftCandidate(Acceptance(typical), most, is_free=True) for most in (1, 4, 2)]
    assert policy.lengths(16, candidates) == [1, 4, 2]
    assert policy.lengths(16, []) == []


def test_a_sequence_whose_drafts_fail_gets_fewer_where_rows_cost() -> None:
    policy = _policy(lambda rows: 0.5 + 0.2 * rows, 0.01)
    candidates = _candidates(4)
    for _ in range(60):
        candidates[0].acceptance.observe(4, 0)
        for candidate in candidates[1:]:
            candidate.acceptance.observe(4, 4)
    bad, *good = policy.lengths(4, candidates)
    assert bad < min(good)


def _num_tried(base: float) -> int:
    """Drafts in 1,600 steps whose drafts always fail, where a row costs 0.5 and a draft 0.2."""
    policy = _policy(lambda rows: base + 0.5 * rows, 0.2)
    (candidate,) = _candidates(1)
    for _ in range(200):
        candidate.acceptance.observe(1, 0)
    tried = 0
    for _ in range(1600):
        (length,) = policy.lengths(1, [candidate])
        tried += length
        policy.observe_target(1 + length, base + 0.5 * (1 + length))
        if length:
            policy.observe_draft(1, 0.2)
            candidate.acceptance.observe(length, 0)
    return tried


def test_bad_drafts_are_tried_again_now_and_then_unless_they_could_not_pay() -> None:
    assert 45 <= _num_tried(base=1.0) <= 60
    assert _num_tried(base=0.0) < 25
