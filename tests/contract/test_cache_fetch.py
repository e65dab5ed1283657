"""Blocks fetched from a cache service that lies: only what was asked for, unchanged, is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import pytest
import xxhash

from baton.core.errors import BatonError, InvalidRequest, KvChecksum
from baton.core.hashing import KvLayout
from baton.v1 import cache_pb2
from baton.wire.cache import CacheBlock, RpcCache
from baton.wire.channel import ChannelPool
from baton.wire.frames import encode_frame

LAYOUT = KvLayout.one_group(4, "float32", (1,), (2,))
GOOD = bytes(range(LAYOUT.block_bytes))
HASHES = [bytes([number]) * 16 for number in range(3)]


def _frame(block_hash: bytes, payload: bytes = GOOD, of: bytes | None = None) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(payload if of is None else of)
    header = cache_pb2.BlockHeader(block_hash=block_hash, checksum=checksum)
    return encode_frame(header.SerializeToString(), payload)


async def _fetch(frames: list[bytes]) -> tuple[list[CacheBlock], BatonError | None]:
    """What a client got of a service that answers with these frames, and how it ended."""

    async def answer(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        for frame in frames:
            yield frame

    server = grpc.aio.server()
    handlers = {"FetchBlocks": grpc.unary_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("baton.v1.CacheService", handlers),
    ))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels = ChannelPool(max_message_bytes=1 << 20)
    found: list[CacheBlock] = []
    try:
        peer = RpcCache(channels, f"127.0.0.1:{port}", xxhash.xxh3_64_intdigest)
        async with aclosing(peer.fetch(HASHES, LAYOUT, timeout_s=20)) as blocks:
            async for block in blocks:
                found += [block]  # what came before an error counts
    except BatonError as error:
        return found, error
    finally:
        await channels.close()
        await server.stop(None)
    return found, None


async def test_blocks_come_in_order_up_to_the_first_that_is_missing() -> None:
    found, error = await _fetch([_frame(HASHES[0]), _frame(HASHES[1])])
    assert error is None
    assert [(block.block_hash, bytes(block.payload)) for block in found] == [
        (HASHES[0], GOOD),
        (HASHES[1], GOOD),
    ]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (_frame(HASHES[1], bytes(LAYOUT.block_bytes), of=GOOD), KvChecksum),
        (_frame(HASHES[2]), KvChecksum),
        (_frame(HASHES[1], GOOD[:-1]), KvChecksum),
        (_frame(HASHES[1], GOOD + b"x"), KvChecksum),
        (_frame(HASHES[1], b""), KvChecksum),
        (encode_frame(b"\xff\xff", GOOD), KvChecksum),
        (b"\x0a\xff", InvalidRequest),
    ],
    ids=["changed", "another", "short", "long", "empty", "no header", "no frame"],
)
async def test_a_wrong_block_is_not_taken(wrong: bytes, reason: type[BatonError]) -> None:
    found, error = await _fetch([_frame(HASHES[0]), wrong, _frame(HASHES[2])])
    assert [block.block_hash for block in found] == HASHES[:1]
    assert isinstance(error, reason)
