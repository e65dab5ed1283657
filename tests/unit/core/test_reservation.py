from __future__ import annotations

import itertools

import pytest

from baton.core.errors import Internal, RequestNotFound, StaleEpoch
from baton.core.handoff.reservation import (
    TRANSITIONS,
    Reservation,
    ReservationState,
    ReservationTable,
)


def test_only_listed_transitions_are_legal() -> None:
    for start, end in itertools.product(ReservationState, ReservationState):
        reservation = Reservation("res", "req", 1, 1, 0.0, state=start)
        if (start, end) in TRANSITIONS:
            reservation.transition(end)
            assert reservation.state is end
        else:
            error = StaleEpoch if start is ReservationState.RELEASED else Internal
            with pytest.raises(error):
                reservation.transition(end)
            assert reservation.state is start


def test_leases_end_unless_renewed_or_attached() -> None:
    table = ReservationTable(lease_s=10.0)
    kept = table.open("a", "req-a", 1, now=0.0)
    lost = table.open("b", "req-b", 1, now=0.0)
    attached = table.open("c", "req-c", 1, now=0.0)
    attached.is_attached = True
    assert table.renew(["a", "zz"], now=5.0) == ["zz"]
    assert table.expired(9.9) == []
    assert table.expired(10.0) == [lost]
    table.release(lost)
    assert table.expired(14.9) == []
    assert table.expired(15.0) == [kept]
    assert {kept.epoch, lost.epoch, attached.epoch} == {1, 2, 3}


def test_a_higher_attempt_replaces_a_lower_one_only() -> None:
    table = ReservationTable(lease_s=10.0)
    second = table.open("b", "req", 2, now=0.0)
    for attempt in (1, 2):
        with pytest.raises(StaleEpoch, match="attempt 2 is here"):
            table.older("req", attempt)
    assert table.older("req", 3) == [second]
    assert table.older("other", 1) == []
    table.release(second)
    third = table.open("c", "req", 3, now=0.0)
    assert third.epoch > second.epoch
    assert table.find("c", third.epoch) is third
    with pytest.raises(StaleEpoch):
        table.find("c", third.epoch - 1)
    with pytest.raises(RequestNotFound):
        table.find("b", second.epoch)
