"""Bounds of a session's event stream, with a stand-in for the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

import pytest

from baton.core.errors import Internal, InvalidRequest, Stalled
from baton.core.handoff.reservation import ReservationState
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.decode.outbox import MAX_PENDING_EVENTS
from baton.decode.sessions import Sessions
from baton.engine.events import EngineEvent, Failed, Grant, Tokens
from baton.wire.clock import SystemClock


class _Worker:
    """Records what the sessions ask of the engine."""

    def __init__(self) -> None:
        self.engine = mock.Mock()
        self.engine.sequences.reserve.return_value = Grant(num_blocks=3, num_cached_blocks=0)
        self.engine.sequences.release.return_value = 3
        self.callbacks: dict[str, Callable[[EngineEvent], None]] = {}
        self.is_alive = True

    def subscribe(self, seq_id: str, callback: Callable[[EngineEvent], None]) -> None:
        self.callbacks[seq_id] = callback

    def unsubscribe(self, seq_id: str) -> None:
        self.callbacks.pop(seq_id, None)


def _sessions() -> tuple[Any, Sessions, list[str]]:
    worker, outcomes = _Worker(), []  # type: ignore[var-annotated]
    sessions = Sessions(
        worker,  # type: ignore[arg-type]
        lease_s=10.0,
        progress_timeout_s=0.05,
        rng=Random(1),
        clock=SystemClock(),
        on_end=lambda _, outcome: outcomes.append(outcome),
    )
    return worker, sessions, outcomes


def _spec(seq_id: str) -> SequenceSpec:
    return SequenceSpec(seq_id, (1, 2, 3), SamplingParams(seed=1), max_tokens=9)


def _tokens(index: int) -> Tokens:
    return Tokens("a/1", index, (7,), (), None, None, 0, 0, 1.0)


async def test_a_reader_too_far_behind_fails_alone() -> None:
    worker, sessions, outcomes = _sessions()
    slow = sessions.reserve(_spec("a/1"), "a", 1)
    other = sessions.reserve(_spec("b/1"), "b", 1)
    deliver = worker.callbacks["a/1"]
    for index in range(MAX_PENDING_EVENTS + 5):
        deliver(_tokens(index))
    worker.engine.sequences.release.assert_called_once_with("a/1", quarantine=False)
    assert outcomes == ["stalled"]
    with pytest.raises(Stalled, match="read faster"):
        await slow.outbox.take()
    assert other.error is None
    assert "a/1" not in worker.callbacks


async def test_release_reaches_the_engine_once() -> None:
    worker, sessions, _ = _sessions()
    session = sessions.reserve(_spec("a/1"), "a", 1)
    assert sessions.release(session, Internal("x")) == 3
    assert sessions.release(session, Internal("x")) == 0
    assert sessions.release_named("", "a", "again") == 0
    worker.engine.sequences.release.assert_called_once()
    assert len(sessions) == 0


async def test_blocks_stay_quarantined_until_the_writer_is_done() -> None:
    worker, sessions, _ = _sessions()
    session = sessions.reserve(_spec("a/1"), "a", 1)
    sessions.push_opened(session)
    sessions.release_named("", "a", "cancelled")
    worker.engine.sequences.release.assert_called_once_with("a/1", quarantine=True)
    worker.engine.sequences.end_quarantine.assert_not_called()
    sessions.writes_ended(session)
    worker.engine.sequences.end_quarantine.assert_called_once_with("a/1")


async def test_a_hand_off_that_the_engine_refuses_ends_the_session_at_once() -> None:
    worker, sessions, _ = _sessions()
    worker.engine.sequences.commit.side_effect = InvalidRequest(
        "token 1000000 is not in the vocabulary"
    )
    session = sessions.reserve(_spec("a/1"), "a", 1)
    sessions.attach(session.reservation.reservation_id, session.reservation.epoch)
    session.reservation.transition(ReservationState.FILLING)
    sessions.push_opened(session)
    with pytest.raises(InvalidRequest) as caught:
        sessions.commit(session, mock.Mock(first_token_id=1_000_000))
    sessions.push_ended(session, caught.value)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await anext(sessions.stream(session, local_prefill=False))
    assert len(sessions) == 0
    worker.engine.sequences.release.assert_called_once_with("a/1", quarantine=True)


async def test_an_engine_that_died_ends_the_stream() -> None:
    worker, sessions, _ = _sessions()
    session = sessions.reserve(_spec("a/1"), "a", 1)
    sessions.attach(session.reservation.reservation_id, session.reservation.epoch)
    stream = sessions.stream(session, local_prefill=True)
    worker.is_alive = False
    with pytest.raises(Internal, match="engine has stopped"):
        await anext(stream)


async def test_a_failed_sequence_fails_its_reader() -> None:
    worker, sessions, outcomes = _sessions()
    session = sessions.reserve(_spec("a/1"), "a", 1)
    worker.callbacks["a/1"](Failed("a/1", Internal("broken")))
    with pytest.raises(Internal, match="broken"):
        await session.outbox.take()
    assert outcomes == ["internal"]
    await sessions.wait_idle()
