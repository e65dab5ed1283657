from __future__ import annotations

import random
from dataclasses import dataclass, replace
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import (
    BatonError,
    KvChecksum,
    KvLayoutMismatch,
    StaleEpoch,
)
from baton.core.handoff.frames import KvChunk, Manifest, Opening
from baton.core.handoff.outgoing import Outgoing
from baton.core.handoff.reservation import Reservation, ReservationState, ReservationTable
from baton.core.handoff.verification import Expected, Ledger, Receiver
from baton.core.hashing import Fingerprint, KvLayout

LAYOUT = KvLayout.one_group(
    block_size=4, dtype="float32", num_kv_heads=(2, 1, 2), head_dim=(4, 8, 4)
)
FINGERPRINT = Fingerprint("demo", "c", "w", "t", LAYOUT)


def _digest(data: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Push:
    """A whole push as frames."""

    opening: Opening
    chunks: tuple[tuple[KvChunk, bytes], ...]
    manifest: Manifest


def _push(block_start: int, block_end: int, max_chunk_bytes: int, epoch: int = 1) -> Push:
    ledger = Ledger(_digest)
    rng = random.Random(block_end)
    chunks = []
    outgoing = Outgoing(LAYOUT, block_start, block_end)
    outgoing.blocks_ready(block_end)
    while (span := outgoing.take(max_chunk_bytes)) is not None:
        payload = rng.randbytes(span.num_bytes(LAYOUT))
        chunks.append((KvChunk(epoch, ledger.num_chunks, span, _digest(payload)), payload))
        ledger.add(len(payload), _digest(payload))
    manifest = Manifest(
        epoch=epoch,
        num_chunks=ledger.num_chunks,
        num_bytes=ledger.num_bytes,
        block_start=block_start,
        num_blocks=block_end - block_start,
        num_tokens=block_end * 4 - 1,
        tokens_hash=b"tokens",
        checksum=ledger.checksum,
        first_token_id=5,
    )
    opening = Opening("res", "req", 1, epoch, FINGERPRINT, "prefill-1")
    return Push(opening, tuple(chunks), manifest)


def _receiver(push: Push) -> tuple[Receiver, Reservation]:
    reservation = ReservationTable(15.0).open("res", "req", 1, now=0.0)
    manifest = push.manifest
    expected = Expected(
        FINGERPRINT,
        manifest.block_start,
        manifest.block_start + manifest.num_blocks,
        manifest.num_tokens,
        manifest.tokens_hash,
    )
    return Receiver(reservation, expected, _digest), reservation


def _receive(receiver: Receiver, push: Push) -> None:
    receiver.open(push.opening)
    for chunk, payload in push.chunks:
        receiver.chunk(chunk, memoryview(payload))
    receiver.manifest(push.manifest)


pushes = st.builds(
    lambda start, num, size: _push(start, start + num, size),
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 4000),
)


@given(pushes)
def test_a_whole_push_is_accepted(push: Push) -> None:
    receiver, reservation = _receiver(push)
    _receive(receiver, push)
    assert reservation.state is ReservationState.FILLING
    assert receiver.received.num_bytes == sum(len(payload) for _, payload in push.chunks)
    reservation.transition(ReservationState.COMMITTED)


def _broken(  # noqa: C901
    push: Push, kind: str, at: int
) -> tuple[Push, type[BatonError]]:
    chunks = list(push.chunks)
    at %= len(chunks)
    chunk, payload = chunks[at]
    if kind == "corrupt":
        changed = bytearray(payload)
        changed[len(payload) // 2] ^= 1
        chunks[at] = (chunk, bytes(changed))
    elif kind == "truncated":
        chunks[at] = (chunk, payload[:-1])
        return replace(push, chunks=tuple(chunks)), KvLayoutMismatch
    elif kind == "missing":
        del chunks[at]
    elif kind == "repeated":
        chunks.insert(at, chunks[at])
    elif kind == "renumbered":
        # Left out, and the rest numbered as if nothing were missing, manifest included.
        del chunks[at]
        ledger = Ledger(_digest)
        for index, (old, content) in enumerate(chunks):
            chunks[index] = (replace(old, sequence=index), content)
            ledger.add(len(content), old.checksum)
        manifest = replace(
            push.manifest,
            num_chunks=ledger.num_chunks,
            num_bytes=ledger.num_bytes,
            checksum=ledger.checksum,
        )
        return replace(push, chunks=tuple(chunks), manifest=manifest), KvChecksum
    elif kind == "reordered":
        chunks = chunks[::-1] if len(chunks) > 1 else [(replace(chunk, sequence=1), payload)]
    elif kind == "twice":
        chunks.append((replace(chunk, sequence=len(chunks)), payload))
    elif kind == "stale":
        chunks[at] = (replace(chunk, epoch=chunk.epoch + 1), payload)
        return replace(push, chunks=tuple(chunks)), StaleEpoch
    elif kind == "outside":
        span = replace(chunk.span, block_start=push.manifest.num_blocks + 99)
        chunks[at] = (replace(chunk, span=span), payload)
        return replace(push, chunks=tuple(chunks)), KvLayoutMismatch
    return replace(push, chunks=tuple(chunks)), KvChecksum


KINDS = [
    "corrupt",
    "truncated",
    "missing",
    "repeated",
    "renumbered",
    "reordered",
    "twice",
    "stale",
    "outside",
]


@given(pushes, st.sampled_from(KINDS), st.integers(0, 1000))
def test_a_broken_push_is_never_accepted(push: Push, kind: str, at: int) -> None:
    broken, error = _broken(push, kind, at)
    receiver, _ = _receiver(push)
    with pytest.raises(error):
        _receive(receiver, broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_chunks", 99),
        ("num_bytes", 1),
        ("block_start", 7),
        ("num_blocks", 7),
        ("num_tokens", 1),
        ("tokens_hash", b"others"),
        ("checksum", 1),
    ],
)
def test_a_manifest_that_differs_is_refused(field: str, value: object) -> None:
    push = _push(1, 4, 1000)
    receiver, _ = _receiver(push)
    wrong = replace(push, manifest=replace(push.manifest, **{field: value}))
    with pytest.raises(KvChecksum, match=field.removeprefix("num_")):
        _receive(receiver, wrong)


def test_a_stale_opening_or_manifest_is_refused() -> None:
    push = _push(0, 2, 1000)
    for opening in (
        replace(push.opening, epoch=2),
        replace(push.opening, attempt=2),
        replace(push.opening, request_id="other"),
    ):
        receiver, reservation = _receiver(push)
        with pytest.raises(StaleEpoch):
            receiver.open(opening)
        assert reservation.state is ReservationState.RESERVED
    receiver, _ = _receiver(push)
    with pytest.raises(StaleEpoch):
        _receive(receiver, replace(push, manifest=replace(push.manifest, epoch=2)))


def test_a_second_push_and_one_without_opening_are_refused() -> None:
    push = _push(0, 2, 1000)
    receiver, reservation = _receiver(push)
    with pytest.raises(StaleEpoch):
        receiver.chunk(push.chunks[0][0], memoryview(push.chunks[0][1]))
    _receive(receiver, push)
    with pytest.raises(StaleEpoch):
        receiver.open(push.opening)
    reservation.transition(ReservationState.COMMITTED)
    with pytest.raises(StaleEpoch):
        receiver.manifest(push.manifest)


def test_a_mismatch_says_how_the_two_differ() -> None:
    push = _push(0, 2, 1000)
    receiver, reservation = _receiver(push)
    theirs = replace(FINGERPRINT, weights_hash="x", layout=replace(LAYOUT, dtype="bfloat16"))
    with pytest.raises(KvLayoutMismatch, match=r"weights: w != x; dtype: float32 != bfloat16"):
        receiver.open(replace(push.opening, fingerprint=theirs))
    assert reservation.state is ReservationState.RESERVED


def test_a_released_reservation_takes_no_write() -> None:
    push = _push(0, 4, 1)
    table = ReservationTable(15.0)
    reservation = table.open("res", "req", 1, now=0.0)
    expected = Expected(FINGERPRINT, 0, 4, 15, b"tokens")
    receiver = Receiver(reservation, expected, _digest)
    receiver.open(push.opening)
    receiver.chunk(push.chunks[0][0], memoryview(push.chunks[0][1]))
    assert table.release(reservation)
    with pytest.raises(StaleEpoch):
        receiver.chunk(push.chunks[1][0], memoryview(push.chunks[1][1]))
    with pytest.raises(StaleEpoch):
        receiver.manifest(push.manifest)
    assert not table.release(reservation)
    assert len(table) == 0
