"""What follows a failed attempt."""

from __future__ import annotations

from random import Random

import pytest

from baton.core.errors import RETRY_ELSEWHERE, ErrorReason, error_for
from baton.scheduler.placer import AttemptFailed, Failover, Verdict


def _failure(reason: ErrorReason, worker_id: str = "w") -> AttemptFailed:
    return AttemptFailed("decode", worker_id, error_for(reason, "why"))


def _failover(max_attempts: int = 4) -> Failover:
    return Failover(max_attempts, Random(1))


@pytest.mark.parametrize("reason", ErrorReason)
def test_verdict_of_every_reason(reason: ErrorReason) -> None:
    verdict = _failover().judge(_failure(reason))
    if reason in {ErrorReason.KV_CACHE_FULL, ErrorReason.QUEUE_FULL}:
        assert verdict is Verdict.TRY_NEXT
    elif reason in RETRY_ELSEWHERE or reason in {
        ErrorReason.REQUEST_NOT_FOUND,
        ErrorReason.KV_LAYOUT_MISMATCH,
        ErrorReason.INTERNAL,
    }:
        assert verdict is Verdict.RETRY
    else:
        assert verdict is Verdict.GIVE_UP


def test_attempts_end() -> None:
    failover = _failover(3)
    verdicts = [failover.judge(_failure(ErrorReason.STALLED, f"w{i}")) for i in range(3)]
    assert verdicts == [Verdict.RETRY, Verdict.RETRY, Verdict.GIVE_UP]
    assert failover.excluded == {"w0", "w1", "w2"}


def test_a_worker_that_answered_is_avoided_but_not_in_doubt() -> None:
    failover = _failover()
    failover.judge(_failure(ErrorReason.STALE_EPOCH, "a"))
    failover.judge(_failure(ErrorReason.NO_WORKER, "b"))
    assert failover.excluded == {"a", "b"}
    assert failover.unreachable == {"b"}


def test_a_defect_is_not_shown_to_every_worker() -> None:
    failover = _failover()
    assert failover.judge(_failure(ErrorReason.INTERNAL, "a")) is Verdict.RETRY
    assert failover.judge(_failure(ErrorReason.INTERNAL, "b")) is Verdict.GIVE_UP


def test_full_workers_cost_no_attempt_but_are_not_asked_for_ever() -> None:
    failover = _failover(2)
    for worker_id in ("a", "b", "c"):
        failure = _failure(ErrorReason.KV_CACHE_FULL, worker_id)
        assert failover.judge(failure) is Verdict.TRY_NEXT
    assert failover.num_failures == 0
    assert failover.excluded == {"a", "b", "c"}
    again = [failover.judge(_failure(ErrorReason.KV_CACHE_FULL, "a")) for _ in range(2)]
    assert again[-1] is Verdict.GIVE_UP


def test_all_waits_for_room_together_are_bounded() -> None:
    failover = _failover()
    failover.judge(_failure(ErrorReason.KV_CACHE_FULL))
    assert failover.room_wait_s(10.0, 100.0) == 10.0
    assert not failover.excluded
    assert failover.room_wait_s(10.0, 104.0) == 6.0
    assert failover.room_wait_s(10.0, 200.0) == 0.0


def test_backoff_grows_with_jitter_and_is_bounded() -> None:
    failover = _failover(100)
    waits = []
    for _ in range(12):
        failover.judge(_failure(ErrorReason.STALLED))
        waits.append(failover.backoff_s())
    assert 0.025 <= waits[0] <= 0.05
    assert 0.5 <= waits[-1] <= 1.0
    assert len(set(waits)) == len(waits)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (ErrorReason.NO_WORKER, True),
        (ErrorReason.STALLED, True),
        (ErrorReason.WORKER_DRAINING, True),
        (ErrorReason.KV_CHECKSUM, False),
        (ErrorReason.KV_CACHE_FULL, False),
    ],
)
def test_only_silence_puts_the_worker_itself_in_doubt(reason: ErrorReason, expected: bool) -> None:
    assert _failure(reason).is_unreachable is expected
