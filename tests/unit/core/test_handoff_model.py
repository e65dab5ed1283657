"""All behaviours of small hand-offs, over the real core code.

Two workers, two requests that share a prefix, and a network and a scheduler that do anything:
frames are lost, repeated, damaged and overtaken, calls are cancelled, leases end, workers crash,
threads write late. Every reachable state is visited once and checked.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import pytest

from baton.core.errors import KvCacheFull
from baton.core.handoff.reservation import ReservationState
from baton.core.handoff.verification import Receiver
from tests.support.handoff_decoder import NUM_BLOCKS, Decoder, Frame, copied, frames_of

MAX_ATTEMPTS = {"a": 2, "b": 1}
MAX_IN_FLIGHT = 2
"""Frames of a push on their way: as far as they can overtake each other."""


@dataclass
class Request:
    """What the scheduler and the prefill worker know of a request."""

    attempt: int = 0
    reservation_id: str = ""
    """Empty while nothing runs."""
    outcome: str = ""


@dataclass
class World:
    """Both workers, the scheduler, and what is on its way."""

    decoder: Decoder
    faults_left: int
    requests: dict[str, Request] = field(
        default_factory=lambda: {name: Request() for name in MAX_ATTEMPTS}
    )
    unsent: dict[str, tuple[Frame, ...]] = field(default_factory=dict)
    """By reservation: what the prefill worker has still to send."""
    network: tuple[Frame, ...] = ()

    def clone(self) -> World:
        requests = {name: copied(request) for name, request in self.requests.items()}
        decoder, unsent = self.decoder.clone(), {**self.unsent}
        return World(decoder, self.faults_left, requests, unsent, self.network)

    def key(self) -> object:
        return (
            self.decoder.key(),
            self.faults_left,
            tuple((r.attempt, r.reservation_id, r.outcome) for r in self.requests.values()),
            tuple(sorted((name, len(frames)) for name, frames in self.unsent.items())),
            tuple(sorted(self.network)),
        )

    def settle(self) -> None:
        """Lets all frames of what is over arrive: none may change anything, whenever it comes."""
        for frames in ([*self.network], *self.unsent.values()):
            for frame in frames:
                if self.decoder.is_over(frame.reservation_id):
                    before = self.decoder.key()
                    self.decoder.receive(frame)
                    assert self.decoder.key() == before, "a late frame changed something"
        is_over = self.decoder.is_over
        self.network = tuple(f for f in self.network if not is_over(f.reservation_id))
        self.unsent = {name: rest for name, rest in self.unsent.items() if not is_over(name)}

    def check(self) -> None:
        self.decoder.pool.check()
        assert sum(self.decoder.pool.counts().values()) == NUM_BLOCKS

    def check_end(self) -> None:
        counts = self.decoder.pool.counts()
        assert counts["free"] + counts["cached"] == NUM_BLOCKS, f"leaked: {counts}"
        assert len(self.decoder.table) == 0
        assert all(request.outcome for request in self.requests.values())


Action = Callable[[World], None]
Moves = Iterator[tuple[str, Action]]
"""What can happen, and its name."""


def _reserve(name: str) -> Action:
    def act(world: World) -> None:
        request = world.requests[name]
        reservation_id = f"{name}/{request.attempt + 1}"
        try:
            session = world.decoder.reserve(reservation_id, name, request.attempt + 1)
        except KvCacheFull:
            request.outcome = "refused"
            return
        request.attempt += 1
        request.reservation_id = reservation_id
        world.unsent[reservation_id] = frames_of(name, session.reservation, session.block_start)

    return act


def _give_up(name: str, *, is_told: bool) -> Action:
    """The scheduler ends an attempt; its message arrives, or does not."""

    def act(world: World) -> None:
        request = world.requests[name]
        if is_told:
            world.decoder.release(request.reservation_id)
        else:
            world.faults_left -= 1
        request.reservation_id = ""
        if request.attempt >= MAX_ATTEMPTS[name]:
            request.outcome = "failed"

    return act


def _run(name: str) -> Action:
    def act(world: World) -> None:
        world.decoder.run(world.decoder.sessions[world.requests[name].reservation_id])

    return act


def _finish(name: str) -> Action:
    def act(world: World) -> None:
        request = world.requests[name]
        world.decoder.release(request.reservation_id)
        request.outcome, request.reservation_id = "finished", ""

    return act


def _send(reservation_id: str) -> Action:
    def act(world: World) -> None:
        first, *rest = world.unsent.pop(reservation_id)
        if rest:
            world.unsent[reservation_id] = tuple(rest)
        world.network += (first,)

    return act


def _take(frame: Frame, *, is_delivered: bool, is_kept: bool) -> Action:
    def act(world: World) -> None:
        world.faults_left -= is_kept or not is_delivered
        if not is_kept:
            frames = [*world.network]
            frames.remove(frame)
            world.network = tuple(frames)
        if is_delivered:
            world.decoder.receive(frame)

    return act


def _damage(frame: Frame) -> Action:
    """A chunk arrives with another content."""

    def act(world: World) -> None:
        chunk, _ = frame.body  # type: ignore[misc]
        _take(frame, is_delivered=False, is_kept=False)(world)
        world.decoder.receive(replace(frame, body=(chunk, b"????")))

    return act


def _on_session(name: str, method: str) -> Action:
    def act(world: World) -> None:
        getattr(world.decoder, method)(world.decoder.sessions[name])

    return act


def _expire(name: str) -> Action:
    def act(world: World) -> None:
        expired = world.decoder.table.expired(now=2.0)
        assert name in {item.reservation_id for item in expired}
        world.decoder.release(name)

    return act


def _crash_prefill(world: World) -> None:
    world.faults_left -= 1
    world.unsent.clear()


def _crash_decode(world: World) -> None:
    """It comes back empty, and counts epochs from the start again."""
    world.faults_left -= 1
    world.decoder = Decoder(world.decoder.is_quarantining)


def _of_scheduler(world: World) -> Moves:
    for name, request in world.requests.items():
        if request.outcome:
            continue
        if not request.reservation_id:
            yield "reserve", _reserve(name)
            continue
        session = world.decoder.sessions.get(request.reservation_id)
        state = session.reservation.state if session else None
        if state is ReservationState.COMMITTED:
            yield "run", _run(name)
        if state is ReservationState.RUNNING:
            yield "finish", _finish(name)
        yield "give up", _give_up(name, is_told=True)
        if world.faults_left and state is not ReservationState.RUNNING:
            yield "lose a release", _give_up(name, is_told=False)


def _of_network(world: World) -> Moves:
    for name in world.unsent:
        if sum(frame.reservation_id == name for frame in world.network) < MAX_IN_FLIGHT:
            yield "send", _send(name)
    for frame in dict.fromkeys(world.network):
        if world.faults_left:
            yield "lose", _take(frame, is_delivered=False, is_kept=False)
        session = world.decoder.sessions.get(frame.reservation_id)
        if session is not None and session.writing is not None:
            continue  # frames of a push are taken one by one
        others = (other for other in world.network if other.reservation_id == frame.reservation_id)
        is_overtaking = any(other.number < frame.number for other in others)
        kind = "overtake" if is_overtaking else "deliver"
        yield kind, _take(frame, is_delivered=True, is_kept=False)
        if world.faults_left:
            yield "repeat", _take(frame, is_delivered=True, is_kept=True)
            if isinstance(frame.body, tuple):
                yield "damage", _damage(frame)


def _of_workers(world: World) -> Moves:
    for name, session in world.decoder.sessions.items():
        reservation = session.reservation
        if session.writing is not None:
            yield "write", _on_session(name, "write")
        elif session.is_push_open:
            yield "end the stream", _on_session(name, "end_stream")
        if reservation.state is not ReservationState.RELEASED and not reservation.is_attached:
            yield "expire", _expire(name)
    if world.faults_left and world.unsent:
        yield "crash prefill", _crash_prefill
    if world.faults_left and world.decoder.sessions:
        yield "crash decode", _crash_decode


def _moves(world: World) -> Moves:
    """All that can happen next."""
    return chain(_of_scheduler(world), _of_network(world), _of_workers(world))


@dataclass
class Explored:
    num_states: int = 0
    num_ends: int = 0
    outcomes: set[tuple[str, ...]] = field(default_factory=set)
    moves: Counter[str] = field(default_factory=Counter)
    crashed_in: dict[str, set[ReservationState]] = field(default_factory=dict)
    """By crash, the states in which reservations met it."""

    def note(self, kind: str, world: World) -> None:
        self.moves[kind] += 1
        if kind.startswith("crash"):
            live = world.decoder.sessions.values()
            self.crashed_in.setdefault(kind, set()).update(s.reservation.state for s in live)


def _explore(start: World) -> Explored:
    """Visits every state breadth first, so that a failure comes with a shortest history."""
    found, queue, seen = Explored(), deque([start]), {start.key()}
    while queue:
        world = queue.popleft()
        found.num_states += 1
        is_end = True
        for kind, action in _moves(world):
            is_end = False
            found.note(kind, world)
            after = world.clone()
            action(after)
            after.settle()
            key = after.key()
            if key not in seen:
                after.check()
                seen.add(key)
                queue.append(after)
        if is_end:
            world.check_end()
            found.num_ends += 1
            found.outcomes.add(tuple(request.outcome for request in world.requests.values()))
    return found


def test_no_behaviour_without_faults_corrupts_or_leaks() -> None:
    found = _explore(World(Decoder(), faults_left=0))
    assert found.num_ends > 0
    assert ("finished", "finished") in found.outcomes


@pytest.mark.long
@pytest.mark.timeout(240)
def test_no_behaviour_of_two_handoffs_corrupts_or_leaks() -> None:
    found = _explore(World(Decoder(), faults_left=1))
    assert found.num_states > 10_000
    assert {("finished", "finished"), ("finished", "failed"), ("failed", "failed")} <= (
        found.outcomes
    )
    faults = {"lose", "repeat", "damage", "overtake", "crash prefill", "crash decode"}
    faults |= {"lose a release", "expire", "end the stream", "give up"}
    assert min(found.moves[fault] for fault in faults) > 100
    # Workers crash at every step of a hand-off.
    states = {*ReservationState}
    assert found.crashed_in == {"crash decode": states, "crash prefill": states}


def test_the_model_finds_writes_to_blocks_that_were_let_go() -> None:
    with pytest.raises(AssertionError, match="a block written that was let go"):
        _explore(World(Decoder(is_quarantining=False), faults_left=1))


def test_the_model_finds_a_missing_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Receiver, "_check_filling", lambda *_: None)
    with pytest.raises(AssertionError, match=r"a stale write|a dead push|a late frame"):
        _explore(World(Decoder(), faults_left=1))


def test_the_model_finds_an_unchecked_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Receiver, "manifest", lambda self, manifest: self._check_filling(manifest.epoch)
    )
    with pytest.raises(AssertionError, match="wrong KV committed"):
        _explore(World(Decoder(), faults_left=1))
