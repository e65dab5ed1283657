"""A decode worker as `baton.decode` and the engine put the core together, small enough to explore.

For tests that let hand-offs go every way there is: it checks at each write and commit that the real
core code has let through nothing that it must not.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from baton.core.blocks import BlockPool, BlockState
from baton.core.errors import BatonError, KvCacheFull
from baton.core.handoff.frames import KvChunk, Manifest, Opening, Span
from baton.core.handoff.reservation import Reservation, ReservationState, ReservationTable
from baton.core.handoff.verification import Expected, Ledger, Receiver
from baton.core.hashing import Fingerprint, KvLayout

LAYOUT = KvLayout.one_group(block_size=1, dtype="float16", num_kv_heads=(1,), head_dim=(1,))
FINGERPRINT = Fingerprint("demo", "c", "w", "t", LAYOUT)
NUM_BLOCKS = 3
PROMPTS = {
    "a": ("x", "a"),
    "b": ("x", "b"),
    "c": ("x", "y", "c"),
    "d": ("x", "y", "z", "d"),
    "e": ("e",),
}
"""One token per block; the first ones are shared."""


def digest(data: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def payload_of(request_id: str, index: int) -> bytes:
    return "".join(PROMPTS[request_id][: index + 1]).rjust(4).encode()


def hash_of(request_id: str, index: int) -> bytes:
    return b"hash of " + payload_of(request_id, index)


def copied(source: Any, **changes: Any) -> Any:
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
    body: Opening | Manifest | tuple[KvChunk, bytes] = field(repr=False, compare=False)


def frames_of(request_id: str, reservation: Reservation, block_start: int) -> tuple[Frame, ...]:
    epoch, ledger = reservation.epoch, Ledger(digest)
    chunks = []
    for index in range(block_start, len(PROMPTS[request_id])):
        payload = payload_of(request_id, index)
        chunk = KvChunk(epoch, ledger.num_chunks, Span(0, 1, index, 1), digest(payload))
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
        shared = self.pool.match(hash_of(request_id, index) for index in range(num_blocks - 1))
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
            Receiver(reservation, expected, digest),
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
            assert self.memory.get(block_id) == payload_of(request_id, index), "wrong KV committed"
        session.reservation.transition(ReservationState.COMMITTED)
        self.pool.set_stage(session.blocks, BlockState.READY)
        for index, block_id in enumerate(session.blocks):
            self.pool.publish(block_id, hash_of(request_id, index))
        session.is_push_open = False

    def _close(self, session: Session) -> None:
        if session.writing is None:
            session.is_push_open = False
            self.pool.end_quarantine(session.quarantined)
            session.quarantined = []

    def clone(self) -> Decoder:
        table = copied(self.table, _by_id={})
        sessions = {}
        for name, old in self.sessions.items():
            if self.is_over(name):
                sessions[name] = old
                continue
            reservation = copied(old.reservation)
            ledger = copied(old.receiver.received)
            ledger._checksums = bytearray(ledger._checksums)
            receiver = copied(
                old.receiver,
                _reservation=reservation,
                _written=[*old.receiver._written],
                received=ledger,
            )
            sessions[name] = copied(old, reservation=reservation, receiver=receiver)
            if name in self.table._by_id:
                table._by_id[name] = reservation
        pool = copied(
            self.pool,
            _blocks=[copied(block) for block in self.pool._blocks],
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
