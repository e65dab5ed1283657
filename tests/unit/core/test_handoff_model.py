"""All behaviours of small hand-offs, over the real core code.

Two workers, two requests that share a prefix, and a network and a scheduler that do anything:
frames are lost, repeated and overtaken, calls are cancelled, leases end, workers crash, threads
write late. Every reachable state is visited once and checked.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any

import pytest

from baton.core.blocks import BlockPool, BlockState
from baton.core.errors import BatonError, KvCacheFull
from baton.core.handoff import Chunk, Expected, Ledger, Manifest, Opening, Receiver, Span
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.reservation import Reservation, ReservationState, ReservationTable

LAYOUT = KvLayout(block_size=1, dtype="float16", num_kv_heads=(1,), head_dim=(1,))
FINGERPRINT = Fingerprint("demo", "c", "w", "t", LAYOUT)
NUM_BLOCKS = 3
PROMPTS = {"a": ("x", "a"), "b": ("x", "b")}
"""One token per block; the first one is shared."""
MAX_ATTEMPTS = {"a": 2, "b": 1}


MAX_IN_FLIGHT = 2
"""Frames of a push on their way: as far as they can overtake each other."""


def _digest(data: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _payload(request_id: str, index: int) -> bytes:
    return "".join(PROMPTS[request_id][: index + 1]).rjust(4).encode()


def _hash(request_id: str, index: int) -> bytes:
    return b"hash of " + _payload(request_id, index)


def _copy(source: Any, **changes: Any) -> Any:
    """A shallow copy with changes; many times as fast as the copy module's."""
    made = object.__new__(type(source))
    names = getattr(type(source), "__slots__", None) or vars(source)
    for name in names:
        setattr(made, name, changes[name] if name in changes else getattr(source, name))
    return made


@dataclass(frozen=True, order=True)
class Frame:
    """A frame on its way; the stream that it belongs to names the reservation."""

    reservation_id: str
    epoch: int
    number: int
    """Position within its push."""
    body: Opening | Manifest | tuple[Chunk, bytes] = field(repr=False, compare=False)


def _frames(request_id: str, reservation: Reservation, block_start: int) -> tuple[Frame, ...]:
    epoch, ledger = reservation.epoch, Ledger(_digest)
    chunks = []
    for index in range(block_start, len(PROMPTS[request_id])):
        payload = _payload(request_id, index)
        chunk = Chunk(epoch, ledger.num_chunks, Span(0, 1, index, 1), _digest(payload))
        ledger.add(len(payload), chunk.checksum)
        chunks.append((chunk, payload))
    num_blocks = len(chunks)
    manifest = Manifest(
        epoch,
        ledger.num_chunks,
        ledger.num_bytes,
        block_start,
        num_blocks,
        len(PROMPTS[request_id]),
        request_id.encode(),
        ledger.checksum,
        0,
    )
    opening = Opening(
        reservation.reservation_id, request_id, reservation.attempt, epoch, FINGERPRINT, "p"
    )
    bodies = (opening, *chunks, manifest)
    return tuple(
        Frame(reservation.reservation_id, epoch, number, body) for number, body in enumerate(bodies)
    )


@dataclass
class Session:
    """What a decode worker has beside a reservation."""

    reservation: Reservation
    receiver: Receiver
    blocks: list[int]
    block_epochs: list[int]
    block_start: int
    is_push_open: bool = False
    writing: tuple[int, bytes] | None = None
    """Index and content of a verified chunk that a thread is about to write."""
    quarantined: list[int] = field(default_factory=list)


@dataclass
class Decoder:
    """A decode worker, as `baton.decode` and the engine put the core together."""

    is_quarantining: bool = True
    table: ReservationTable = field(default_factory=lambda: ReservationTable(1.0))
    pool: BlockPool = field(default_factory=lambda: BlockPool(NUM_BLOCKS, 1))
    memory: dict[int, bytes] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    """Those that have ended stay while a frame or a write may still come."""

    def reserve(self, reservation_id: str, request_id: str, attempt: int) -> Session:
        for older in self.table.older(request_id, attempt):
            self.release(older.reservation_id)
        num_blocks = len(PROMPTS[request_id])
        shared = self.pool.match(_hash(request_id, index) for index in range(num_blocks - 1))
        self.pool.share(shared)
        try:
            fresh = self.pool.allocate(num_blocks - len(shared), BlockState.RESERVED)
        except KvCacheFull:
            self.pool.release(shared)
            raise
        for block_id in fresh:
            self.memory.pop(block_id, None)
        reservation = self.table.open(reservation_id, request_id, attempt, now=0.0)
        expected = Expected(FINGERPRINT, len(shared), num_blocks, num_blocks, request_id.encode())
        blocks = [*shared, *fresh]
        session = Session(
            reservation,
            Receiver(reservation, expected, _digest),
            blocks,
            [self.pool.epoch(block_id) for block_id in blocks],
            len(shared),
        )
        self.sessions[reservation_id] = session
        return session

    def receive(self, frame: Frame) -> None:
        session = self.sessions.get(frame.reservation_id)
        if session is None:  # this process does not know it: a push finds no reservation
            assert self.table.get(frame.reservation_id) is None
            return
        body = frame.body
        is_live = self.table.get(frame.reservation_id) is session.reservation
        was = session.reservation.state
        try:
            if isinstance(body, Opening):
                session.receiver.open(body)
                assert (is_live, was) == (True, ReservationState.RESERVED), "a dead push was opened"
                session.is_push_open = True
                self.pool.set_stage(session.blocks, BlockState.FILLING)
            elif isinstance(body, Manifest):
                session.receiver.manifest(body)
                assert (is_live, was) == (True, ReservationState.FILLING), "a dead push committed"
                self._commit(session)
            else:
                chunk, payload = body
                session.receiver.chunk(chunk, memoryview(payload))
                is_current = chunk.epoch == session.reservation.epoch
                assert (is_live, is_current) == (True, True), "a stale write"
                session.writing = (chunk.span.block_start, payload)
        except BatonError:
            # Also a repeated opening: within one stream it ends the push.
            if session.reservation.state is ReservationState.FILLING:
                self.release(frame.reservation_id)
            self._close(session)

    def write(self, session: Session) -> None:
        assert session.writing is not None
        index, payload = session.writing
        session.writing = None
        block_id = session.blocks[index]
        assert self.pool.epoch(block_id) == session.block_epochs[index], "another's block written"
        is_ours = self.pool.state(block_id) in {BlockState.FILLING, BlockState.QUARANTINED}
        assert is_ours, "a block written that was let go"
        self.memory[block_id] = payload
        if session.reservation.state is ReservationState.RELEASED:
            self._close(session)

    def run(self, session: Session) -> None:
        session.reservation.transition(ReservationState.RUNNING)
        session.reservation.is_attached = True
        self.pool.set_stage(session.blocks, BlockState.IN_USE)

    def release(self, reservation_id: str) -> None:
        session = self.sessions.get(reservation_id)
        if session is None or not self.table.release(session.reservation):
            return
        if session.is_push_open and self.is_quarantining:
            session.quarantined = self.pool.quarantine(session.blocks)
        else:
            self.pool.release(session.blocks)

    def end_stream(self, session: Session) -> None:
        """The sender is gone, or the session ended while its push waited for a frame."""
        if session.reservation.state is ReservationState.FILLING:
            self.release(session.reservation.reservation_id)
        self._close(session)

    def _commit(self, session: Session) -> None:
        request_id = session.reservation.request_id
        for index, block_id in enumerate(session.blocks):
            assert self.pool.epoch(block_id) == session.block_epochs[index]
            assert self.memory.get(block_id) == _payload(request_id, index), "wrong KV committed"
        session.reservation.transition(ReservationState.COMMITTED)
        self.pool.set_stage(session.blocks, BlockState.READY)
        for index, block_id in enumerate(session.blocks):
            self.pool.publish(block_id, _hash(request_id, index))
        session.is_push_open = False

    def _close(self, session: Session) -> None:
        if session.writing is None:
            session.is_push_open = False
            self.pool.end_quarantine(session.quarantined)
            session.quarantined = []

    def clone(self) -> Decoder:
        table = _copy(self.table, _by_id={})
        sessions = {}
        for name, old in self.sessions.items():
            if self.is_over(name):
                sessions[name] = old
                continue
            reservation = _copy(old.reservation)
            ledger = _copy(old.receiver.received)
            ledger._checksums = bytearray(ledger._checksums)
            receiver = _copy(
                old.receiver,
                _reservation=reservation,
                _written=[*old.receiver._written],
                received=ledger,
            )
            sessions[name] = _copy(old, reservation=reservation, receiver=receiver)
            if name in self.table._by_id:
                table._by_id[name] = reservation
        pool = _copy(
            self.pool,
            _blocks=[_copy(block) for block in self.pool._blocks],
            _free=[*self.pool._free],
            _cached=OrderedDict(self.pool._cached),
            _by_hash={**self.pool._by_hash},
            _counts={**self.pool._counts},
            _changes={},
        )
        return Decoder(self.is_quarantining, table, pool, {**self.memory}, sessions)

    def is_over(self, reservation_id: str) -> bool:
        """True if no frame of the reservation can ever change anything again."""
        session = self.sessions.get(reservation_id)
        return session is None or (
            session.reservation.state is ReservationState.RELEASED
            and not session.is_push_open
            and session.writing is None
        )

    def key(self) -> object:
        """Equal for states that differ in the numbering of blocks only."""
        pool = self.pool
        live = {n: session for n, session in self.sessions.items() if not self.is_over(n)}
        order = [*(i for session in live.values() for i in session.blocks), *pool._cached]
        number = {block_id: index for index, block_id in enumerate(dict.fromkeys(order))}
        blocks = [pool._blocks[block_id] for block_id in number]
        return (
            self.table._epoch,
            tuple((b.num_uses, b.state, b.stage, b.block_hash) for b in blocks),
            tuple(self.memory.get(block_id) for block_id in number),
            tuple(number[block_id] for block_id in pool._cached),
            tuple(
                (
                    name,
                    session.reservation.epoch,
                    session.reservation.state,
                    session.receiver.received.num_chunks,
                    tuple(session.receiver._written),
                    tuple(number[block_id] for block_id in session.blocks),
                    tuple(map(pool.epoch, session.blocks)) == tuple(session.block_epochs),
                    session.is_push_open,
                    session.writing,
                    tuple(number[block_id] for block_id in session.quarantined),
                )
                for name, session in live.items()
            ),
        )


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
        default_factory=lambda: {name: Request() for name in PROMPTS}
    )
    unsent: dict[str, tuple[Frame, ...]] = field(default_factory=dict)
    """By reservation: what the prefill worker has still to send."""
    network: tuple[Frame, ...] = ()

    def clone(self) -> World:
        requests = {name: _copy(request) for name, request in self.requests.items()}
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
        world.unsent[reservation_id] = _frames(name, session.reservation, session.block_start)

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


def _of_scheduler(world: World) -> Iterator[Action]:
    for name, request in world.requests.items():
        if request.outcome:
            continue
        if not request.reservation_id:
            yield _reserve(name)
            continue
        session = world.decoder.sessions.get(request.reservation_id)
        state = session.reservation.state if session else None
        if state is ReservationState.COMMITTED:
            yield _run(name)
        if state is ReservationState.RUNNING:
            yield _finish(name)
        yield _give_up(name, is_told=True)
        if world.faults_left and state is not ReservationState.RUNNING:
            yield _give_up(name, is_told=False)


def _of_network(world: World) -> Iterator[Action]:
    for name in world.unsent:
        if sum(frame.reservation_id == name for frame in world.network) < MAX_IN_FLIGHT:
            yield _send(name)
    for frame in dict.fromkeys(world.network):
        if world.faults_left:
            yield _take(frame, is_delivered=False, is_kept=False)
        session = world.decoder.sessions.get(frame.reservation_id)
        if session is not None and session.writing is not None:
            continue  # frames of a push are taken one by one
        yield _take(frame, is_delivered=True, is_kept=False)
        if world.faults_left:
            yield _take(frame, is_delivered=True, is_kept=True)


def _of_workers(world: World) -> Iterator[Action]:
    for name, session in world.decoder.sessions.items():
        reservation = session.reservation
        if session.writing is not None:
            yield _on_session(name, "write")
        elif session.is_push_open:
            yield _on_session(name, "end_stream")
        if reservation.state is not ReservationState.RELEASED and not reservation.is_attached:
            yield _expire(name)
    if world.faults_left and world.unsent:
        yield _crash_prefill
    if world.faults_left and world.decoder.sessions:
        yield _crash_decode


def _actions(world: World) -> Iterator[Action]:
    """All that can happen next."""
    return chain(_of_scheduler(world), _of_network(world), _of_workers(world))


@dataclass
class Explored:
    num_states: int = 0
    num_ends: int = 0
    outcomes: set[tuple[str, ...]] = field(default_factory=set)


def _explore(start: World) -> Explored:
    """Visits every state breadth first, so that a failure comes with a shortest history."""
    found, queue, seen = Explored(), deque([start]), {start.key()}
    while queue:
        world = queue.popleft()
        found.num_states += 1
        is_end = True
        for action in _actions(world):
            is_end = False
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


@pytest.mark.timeout(240)
def test_no_behaviour_of_two_handoffs_corrupts_or_leaks() -> None:
    found = _explore(World(Decoder(), faults_left=1))
    assert found.num_states > 10_000
    assert {("finished", "finished"), ("finished", "failed"), ("failed", "failed")} <= (
        found.outcomes
    )


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
