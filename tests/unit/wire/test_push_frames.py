"""A push's frames and answers come out as they went in."""

from __future__ import annotations

import pytest

from baton.core.errors import InvalidRequest, KvChecksum
from baton.core.handoff.frames import (
    ChunkFrame,
    Committed,
    Credit,
    KvChunk,
    KvEncoding,
    Manifest,
    Opening,
    PullOffer,
    PushAnswer,
    PushFrame,
    SignOfLife,
    SlotOffer,
    Span,
    Staged,
)
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.sampling import TokenLogprob
from baton.v1 import kv_transfer_pb2
from baton.wire.push_frames import (
    answer_from_pb,
    answer_to_pb,
    failure_to_pb,
    frame_from_bytes,
    frame_to_bytes,
)

FINGERPRINT = Fingerprint("m", "c", "w", "t", KvLayout.one_group(16, "bfloat16", (2,), (8,)))
STAGED = Staged(b"agent", 1 << 40, 8, 1 << 20, b"t" * 16)
CHUNK = KvChunk(7, 3, Span(1, 4, 2, 5), (1 << 64) - 1)


@pytest.mark.parametrize(
    "frame",
    [
        Opening("res", "req", 2, 7, FINGERPRINT, "p"),
        Opening("res", "req", 2, 7, FINGERPRINT, "p", ("nixl", "shm"), STAGED, KvEncoding.INT8),
        ChunkFrame(CHUNK, memoryview(b"kv" * 100)),
        ChunkFrame(CHUNK, memoryview(b""), 200),
        SignOfLife(7),
        Manifest(7, 3, 600, 2, 5, 99, b"h" * 16, (1 << 64) - 2, 42),
        Manifest(7, 3, 600, 2, 5, 99, b"h", 1, 42, TokenLogprob(-0.5, (4, 5), (-0.5, -1.5))),
    ],
    ids=range(7),
)
def test_a_frame_survives(frame: PushFrame) -> None:
    data = frame_to_bytes(frame)
    assert frame_from_bytes(data) == frame
    parsed = kv_transfer_pb2.PushRequest.FromString(data)
    assert parsed.SerializeToString() == data, "any protobuf peer reads and writes the same"


@pytest.mark.parametrize(
    "answer",
    [Credit(4), Committed(600, 3), PullOffer(8, 1 << 20), SlotOffer(4, 8 << 20, b"t" * 16, 9, 5)],
    ids=range(4),
)
def test_an_answer_survives(answer: PushAnswer) -> None:
    assert answer_from_pb(answer_to_pb(answer)) == answer


def test_a_failure_is_raised_where_it_is_read() -> None:
    with pytest.raises(KvChecksum, match="chunk 3"):
        answer_from_pb(failure_to_pb(KvChecksum("chunk 3 is damaged")))


def test_what_is_no_header_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="PushHeader"):
        frame_from_bytes(b"\x0a\x02\xff\xff")
