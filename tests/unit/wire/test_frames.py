from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest
from baton.core.hashing import KvLayout
from baton.v1 import cache_pb2, kv_transfer_pb2
from baton.wire.frames import check_kv_frames, decode_frame, encode_frame

SIZES = [0, 1, 127, 128, 16_383, 16_384, 1 << 20]


def _header(sequence: int) -> kv_transfer_pb2.PushHeader:
    chunk = kv_transfer_pb2.PushChunk(sequence=sequence, checksum=(1 << 64) - 1, layer_end=3)
    return kv_transfer_pb2.PushHeader(chunk=chunk, epoch=7)


@pytest.mark.parametrize("num_bytes", SIZES)
def test_frames_are_what_protobuf_writes(num_bytes: int) -> None:
    payload = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    header = _header(num_bytes)
    message = kv_transfer_pb2.PushRequest(header=header, payload=payload)
    frame = encode_frame(header.SerializeToString(), memoryview(payload))
    assert frame == message.SerializeToString()
    assert encode_frame(header.SerializeToString(), payload) == frame
    assert kv_transfer_pb2.PushRequest.FromString(frame) == message


@given(
    sequence=st.integers(0, (1 << 32) - 1),
    payload=st.binary(max_size=300),
    has_header=st.booleans(),
)
def test_protobuf_messages_are_frames(sequence: int, payload: bytes, has_header: bool) -> None:
    block = cache_pb2.BlockHeader(block_hash=b"h" * 16, checksum=sequence)
    for message in (
        kv_transfer_pb2.PushRequest(header=_header(sequence), payload=payload),
        cache_pb2.StoreBlocksRequest(header=block, payload=payload),
        cache_pb2.FetchBlocksResponse(header=block, payload=payload),
    ):
        if not has_header:
            message.ClearField("header")
        header, body = decode_frame(message.SerializeToString())
        assert header == message.header.SerializeToString()
        assert body == payload


def test_the_payload_is_not_copied() -> None:
    frame = encode_frame(b"header", b"payload" * 1000)
    _, payload = decode_frame(frame)
    assert payload.obj is frame


def test_a_payload_of_wider_items_counts_in_bytes() -> None:
    payload = memoryview(bytes(64)).cast("f")
    assert decode_frame(encode_frame(b"h", payload))[1] == bytes(64)


def test_unknown_fields_of_a_newer_peer_are_skipped() -> None:
    newer = b"\x18\x96\x01" + b"\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x32\x02zz"
    header, payload = decode_frame(newer + encode_frame(b"h", b"p") + newer)
    assert (header, payload) == (b"h", b"p")


@pytest.mark.parametrize("field", [b"\x18\x01", b"\x2d" + bytes(4), b"\x32\x00"])
def test_a_message_of_many_small_fields_is_not_read_to_its_end(field: bytes) -> None:
    assert decode_frame(field * 60 + encode_frame(b"h", b"p"))[1] == b"p"
    unread = b"\x00"  # field number 0: refused by itself, if it is reached
    with pytest.raises(InvalidRequest, match="more than 64 fields"):
        decode_frame(field * 65 + unread)


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_read_but_never_crashes(data: bytes) -> None:
    try:
        decode_frame(data)
    except InvalidRequest:
        return


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(b"h", b"payload")[:-1],
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        encode_frame(b"h", b"p") + encode_frame(b"h", b""),
        b"\x0b",
        b"\x02\x00",
    ],
)
def test_malformed_frames_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="malformed frame"):
        decode_frame(data)


def test_blocks_that_no_message_can_hold_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    layout = KvLayout.one_group(256, "bfloat16", (8,) * 32, (128,) * 32)
    with caplog.at_level(logging.WARNING):
        check_kv_frames(layout, 64 << 20)
        assert not caplog.records
        check_kv_frames(layout, 4 << 20)
    assert "the cache service cannot take this model's KV blocks" in caplog.text
    assert f"have {32 << 20} bytes and a message at most {4 << 20}" in caplog.text
    with pytest.raises(InvalidRequest, match="one layer of a KV block takes 1048576 bytes"):
        check_kv_frames(layout, 1 << 20)
