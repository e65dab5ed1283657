"""Frames of bulk streams: a small header message and a large payload, without copying the payload.

A frame is exactly the protobuf wire form of `message { Header header = 1; bytes payload = 2; }`,
so PushRequest, StoreBlocksRequest and FetchBlocksResponse are such frames and any protobuf peer can
speak to us. The protobuf runtime would copy the payload twice on each side.
"""

from __future__ import annotations

import logging

from baton.core.errors import InvalidRequest
from baton.core.hashing import KvLayout

logger = logging.getLogger(__name__)

MAX_PROBE_BYTES = 64 << 20
"""Most bytes that one measurement of a path sends."""
_MAX_HEADER_BYTES = 4096
_HEADER_TAG = 0x0A
_PAYLOAD_TAG = 0x12
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_FIELDS = 64
"""Of a message: a newer peer's included, and few enough that none keeps the event loop busy."""
_EMPTY = memoryview(b"")


def encode_frame(header: bytes, payload: bytes | memoryview) -> bytes:
    """One frame; `payload` is copied once, into it. Byte-identical to protobuf's own output."""
    parts: list[bytes | memoryview] = [bytes((_HEADER_TAG,)), _varint(len(header)), header]
    num_bytes = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    if num_bytes:
        parts += [bytes((_PAYLOAD_TAG,)), _varint(num_bytes), payload]
    return b"".join(parts)


def check_kv_frames(layout: KvLayout, max_message_bytes: int) -> None:
    """Whether a model's blocks fit into frames: hand-offs cut them by layers, the cache does not.

    Raises:
        InvalidRequest: one layer of one block is more than a message may have.
    """
    layers = range(layout.num_layers)
    smallest = max(layout.layers_block_bytes(layer, layer + 1) for layer in layers)
    if smallest + _MAX_HEADER_BYTES > max_message_bytes:
        raise InvalidRequest(
            f"one layer of a KV block takes {smallest} bytes and a message at most "
            f"{max_message_bytes}: raise max_message_bytes or lower block_size, on all workers"
        )
    if layout.block_bytes + _MAX_HEADER_BYTES > max_message_bytes:
        logger.warning(
            "the cache service cannot take this model's KV blocks: they have %d bytes and a "
            "message at most %d; raise max_message_bytes here and there, or lower block_size",
            layout.block_bytes,
            max_message_bytes,
        )


def decode_frame(data: bytes) -> tuple[memoryview, memoryview]:
    """Header and payload of a frame, as views into `data`; an absent one is empty.

    Raises:
        InvalidRequest: this is no such frame: truncated, malformed, with a field that occurs twice,
            or with too many.
    """
    view = memoryview(data)
    found: dict[int, memoryview] = {}
    at = num_fields = 0
    while at < len(view):
        num_fields += 1
        if num_fields > _MAX_FIELDS:
            raise InvalidRequest(f"malformed frame: more than {_MAX_FIELDS} fields")
        tag, at = _read_varint(view, at)
        if tag >> 3 == 0:
            raise InvalidRequest("malformed frame: field number 0")
        at, field = _read_field(view, at, tag & 7)
        if tag in (_HEADER_TAG, _PAYLOAD_TAG):
            if tag in found:
                raise InvalidRequest(f"malformed frame: field {tag >> 3} occurs twice")
            found[tag] = field
    return found.get(_HEADER_TAG, _EMPTY), found.get(_PAYLOAD_TAG, _EMPTY)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(0x80 | (value & 0x7F))
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        if at + place >= len(view):
            raise InvalidRequest("malformed frame: truncated")
        byte = view[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise InvalidRequest("malformed frame: a number is longer than 10 bytes")


def _read_field(view: memoryview, at: int, wire_type: int) -> tuple[int, memoryview]:
    """Where the field ends, and its content if it has a length."""
    if wire_type == _VARINT:
        _, end = _read_varint(view, at)
        return end, _EMPTY
    if wire_type == _LENGTH:
        num_bytes, at = _read_varint(view, at)
    elif wire_type in _FIXED_BYTES:
        num_bytes = _FIXED_BYTES[wire_type]
    else:
        raise InvalidRequest(f"malformed frame: wire type {wire_type}")
    if at + num_bytes > len(view):
        raise InvalidRequest("malformed frame: truncated")
    return at + num_bytes, view[at : at + num_bytes]
