from __future__ import annotations

from baton.prefill.holds import Holds


def _ids(holds: list) -> list[str]:  # type: ignore[type-arg]
    return [hold.seq_id for hold in holds]


def test_copies_are_taken_out_once_by_release_lease_or_age() -> None:
    holds = Holds(lease_s=10.0)
    holds.add("a/1", "a", 1, now=0.0)
    holds.add("a/2", "a", 2, now=5.0)
    holds.add("b/1", "b", 1, now=6.0)
    holds.add("c/1", "c", 1, now=7.0)
    assert _ids(holds.take("a", 2)) == ["a/2"]
    assert holds.take("a", 2) == []
    assert holds.take_expired(9.9) == []
    assert _ids(holds.take_expired(10.0)) == ["a/1"]
    assert _ids(holds.take_oldest()) == ["b/1"]
    assert len(holds) == 1
    assert _ids(holds.take_all()) == ["c/1"]
    assert holds.take_oldest() == []


def test_attempt_0_means_all_of_a_request() -> None:
    holds = Holds(lease_s=10.0)
    holds.add("a/1", "a", 1, now=0.0)
    holds.add("a/2", "a", 2, now=0.0)
    assert _ids(holds.take("a")) == ["a/1", "a/2"]
