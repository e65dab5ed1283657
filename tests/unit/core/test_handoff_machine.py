"""Random long lives of many reservations: larger than what can be explored to the end.

The real tables, receivers and pools, as a decode worker puts them together; the model knows only
who should hold how many blocks.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.blocks import BlockPool, BlockState
from baton.core.errors import KvCacheFull
from baton.core.handoff.reservation import ReservationState
from tests.support.handoff_decoder import PROMPTS, Decoder, Frame, Session, frames_of

NUM_BLOCKS = 7
HELD = {state.value for state in BlockState} - {"free", "cached"}


class HandoffMachine(RuleBasedStateMachine):
    """Any number of attempts at five requests; frames come late, twice, in any order, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(pool=BlockPool(NUM_BLOCKS, 1))
        self.attempts = dict.fromkeys(PROMPTS, 0)
        self.frames: list[Frame] = []
        """All that was ever made: a network may keep and repeat anything."""

    def sessions(self, *states: ReservationState) -> list[Session]:
        return [s for s in self.decoder.sessions.values() if s.reservation.state in states]

    def draw(self, data: st.DataObject, *states: ReservationState) -> Session | None:
        found = self.sessions(*states)
        return data.draw(st.sampled_from(found)) if found else None

    @rule(name=st.sampled_from(sorted(PROMPTS)))
    def reserve(self, name: str) -> None:
        before = self.decoder.pool.num_available
        attempt = self.attempts[name] + 1
        try:
            session = self.decoder.reserve(f"{name}/{attempt}", name, attempt)
        except KvCacheFull:
            # All or nothing; and only what an earlier attempt held has come free.
            assert self.decoder.pool.num_available >= before
            return
        self.attempts[name] = attempt
        self.frames += frames_of(name, session.reservation, session.block_start)

    @precondition(lambda self: self.frames)
    @rule(data=st.data(), is_newest=st.booleans())
    def receive(self, data: st.DataObject, is_newest: bool) -> None:
        self.take(data.draw(st.sampled_from(self.frames[-6:] if is_newest else self.frames)))

    def take(self, frame: Frame) -> None:
        session = self.decoder.sessions.get(frame.reservation_id)
        if session is None or session.writing is None:
            self.decoder.receive(frame)

    @rule(data=st.data())
    def push_whole(self, data: st.DataObject) -> None:
        """As most hand-offs go: so that commits are common."""
        session = self.draw(data, ReservationState.RESERVED)
        if session is None:
            return
        name = session.reservation.reservation_id
        for frame in [frame for frame in self.frames if frame.reservation_id == name]:
            self.decoder.receive(frame)
            if session.writing is not None:
                self.decoder.write(session)
        assert session.reservation.state is ReservationState.COMMITTED

    @rule()
    def write(self) -> None:
        for session in self.decoder.sessions.values():
            if session.writing is not None:
                self.decoder.write(session)

    @rule(data=st.data())
    def end_stream(self, data: st.DataObject) -> None:
        session = self.draw(data, *ReservationState)
        if session is not None and session.is_push_open:
            self.decoder.end_stream(session)

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        session = self.draw(data, ReservationState.COMMITTED)
        if session is not None:
            self.decoder.run(session)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = self.draw(data, *ReservationState)
        if session is not None:
            for _ in range(2):  # idempotent
                self.decoder.release(session.reservation.reservation_id)
            assert session.reservation.state is ReservationState.RELEASED

    @rule()
    def expire(self) -> None:
        expired = self.decoder.table.expired(now=2.0)
        assert not any(item.is_attached for item in expired)
        for item in expired:
            self.decoder.release(item.reservation_id)
        running = {ReservationState.RUNNING}
        assert {item.state for item in self.decoder.table._by_id.values()} <= running

    @invariant()
    def accounts_balance(self) -> None:
        pool = self.decoder.pool
        pool.check()
        counts = pool.counts()
        assert sum(counts.values()) == NUM_BLOCKS
        live = [s for s in self.sessions(*ReservationState) if not self.is_released(s)]
        held = {block for session in live for block in session.blocks}
        held |= {block for s in self.decoder.sessions.values() for block in s.quarantined}
        assert sum(counts[state] for state in HELD) == len(held)
        assert len(self.decoder.table) == len(live)

    @invariant()
    def epochs_are_never_used_again(self) -> None:
        epochs = [s.reservation.epoch for s in self.decoder.sessions.values()]
        assert len(set(epochs)) == len(epochs)

    @staticmethod
    def is_released(session: Session) -> bool:
        return session.reservation.state is ReservationState.RELEASED

    def teardown(self) -> None:
        """Whatever happened: once all is let go and nobody writes, every block can be had."""
        for session in [*self.decoder.sessions.values()]:
            self.decoder.release(session.reservation.reservation_id)
            if session.writing is not None:
                self.decoder.write(session)
            if session.is_push_open:
                self.decoder.end_stream(session)
        assert self.decoder.pool.num_available == NUM_BLOCKS


TestHandoffs = HandoffMachine.TestCase
TestHandoffs.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_the_machine_reaches_what_it_is_about() -> None:
    """Not by luck: one life with a commit, a quarantine, an expiry and a full pool."""
    machine = HandoffMachine()
    machine.reserve("d")
    frames = list(machine.frames)
    machine.take(frames[0])
    machine.take(frames[1])
    machine.decoder.release("d/1")
    assert machine.decoder.pool.counts()["quarantined"] == 4
    machine.accounts_balance()
    machine.write()
    assert machine.decoder.pool.counts()["free"] == NUM_BLOCKS
    machine.reserve("c")
    machine.reserve("d")
    before = machine.decoder.pool.counts()
    machine.reserve("a")
    assert machine.decoder.pool.counts() == before, "refused: nothing taken"
    machine.expire()
    machine.accounts_balance()
    assert len(machine.decoder.table) == 0
    machine.teardown()


@pytest.mark.parametrize("is_quarantining", [True, False])
def test_the_machine_would_notice_a_missing_quarantine(is_quarantining: bool) -> None:
    machine = HandoffMachine()
    machine.decoder.is_quarantining = is_quarantining
    machine.reserve("a")
    opening, first, *_ = machine.frames
    machine.take(opening)
    machine.take(first)
    machine.decoder.release("a/1")
    machine.reserve("d")
    if is_quarantining:
        machine.write()
        return
    with pytest.raises(AssertionError, match=r"let go|another's"):
        machine.write()
