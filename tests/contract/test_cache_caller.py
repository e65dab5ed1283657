"""One cache service, asked over gRPC and directly: both callers give the same values."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import xxhash

from baton.core.answer_key import KEY_BYTES
from baton.core.errors import BatonError, InvalidRequest, KvChecksum
from baton.rpc.cache_access import rpc_caches
from baton.v1 import cache_pb2
from baton.wire.cache import CacheBlock, CacheCaller
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.worker import write_back
from baton.worker.write_back import WriteBack
from tests.support.cache_process import Cache
from tests.support.direct_callers import DirectCache
from tests.support.eventually import eventually
from tests.support.kv_blocks import LAYOUT, name, payload


@pytest.fixture(params=["grpc", "direct"])
async def caller(request: pytest.FixtureRequest) -> AsyncIterator[CacheCaller]:
    cache = Cache(1 << 20, pinned_bytes=1 << 20)
    await cache.server.start()
    channels = ChannelPool(max_message_bytes=1 << 20)
    if request.param == "grpc":
        yield rpc_caches(channels)(cache.address)
    else:
        yield DirectCache(cache.address, cache.local, SystemClock())
    await channels.close()
    await cache.server.stop(None)


def block(number: int, checksum: int | None = None) -> CacheBlock:
    data = payload(number)
    if checksum is None:
        checksum = xxhash.xxh3_64_intdigest(data)
    return CacheBlock(name(number), LAYOUT, checksum, data)


async def stream(*blocks: CacheBlock) -> AsyncIterator[CacheBlock]:
    for each in blocks:
        yield each


async def fetched(caller: CacheCaller, hashes: Sequence[bytes]) -> list[CacheBlock]:
    async with aclosing(caller.fetch(hashes, LAYOUT, timeout_s=5)) as blocks:
        return [each async for each in blocks]


async def test_blocks_are_stored_found_and_fetched(caller: CacheCaller) -> None:
    assert await caller.store(stream(block(1), block(2)), timeout_s=5) == 2
    assert await caller.store(stream(block(2), block(3)), timeout_s=5) == 1
    hashes = [name(number) for number in (1, 2, 9, 3)]
    assert await caller.num_stored(hashes, timeout_s=5) == 2
    assert await fetched(caller, hashes) == [block(1), block(2)]
    with pytest.raises(KvChecksum):
        await caller.store(stream(block(4), block(5, checksum=1)), timeout_s=5)
    assert await fetched(caller, [name(4), name(5)]) == [block(4)]
    with pytest.raises(InvalidRequest):
        await caller.num_stored([b"short"], timeout_s=5)


async def test_answers_and_pins_are_kept(caller: CacheCaller) -> None:
    key = bytes(KEY_BYTES)
    assert await caller.answer(key, timeout_s=5) == b""
    assert await caller.store_answer(key, b"text", timeout_s=5)
    assert await caller.answer(key, timeout_s=5) == b"text"
    await caller.store(stream(block(1)), timeout_s=5)
    pin = await caller.pin([name(1), name(2)], LAYOUT.block_bytes, 60.0, "mine")
    assert (pin.label, pin.num_blocks, pin.num_stored_blocks) == ("mine", 2, 1)
    assert (pin.num_bytes, pin.remaining_s) == (2 * LAYOUT.block_bytes, 60.0)
    assert await caller.pins() == [pin]
    assert await caller.unpin(pin.pin_id)
    assert not await caller.unpin(pin.pin_id)
    assert await caller.pins() == []


async def test_write_back_goes_on_after_the_cache_ended_a_call_between_two_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_back, "_BATCH_BLOCKS", 1)
    ended = threading.Event()
    num_calls = 0

    async def lookup(request: object, context: Any) -> bytes:
        return b""

    async def take(frames: AsyncIterator[bytes], context: Any) -> bytes:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            await anext(frames)
            context.add_done_callback(lambda _: ended.set())
            await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        num_stored = len([frame async for frame in frames])
        return cache_pb2.StoreBlocksResponse(num_stored=num_stored).SerializeToString()

    server = grpc.aio.server()
    handlers = {
        "LookupPrefix": grpc.unary_unary_rpc_method_handler(lookup),
        "StoreBlocks": grpc.stream_unary_rpc_method_handler(take),
    }
    service = grpc.method_handlers_generic_handler("baton.v1.CacheService", handlers)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels = ChannelPool(max_message_bytes=1 << 20)
    failures: list[BatonError] = []
    peer = rpc_caches(channels)(f"127.0.0.1:{port}")
    access: Any = SimpleNamespace(
        replica=lambda _: peer, failed=lambda _, error: failures.append(error)
    )

    def export(hashes: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        if hashes == [name(2)]:
            ended.wait(10)
            threading.Event().wait(0.2)  # until the client has heard of it, too
        return [(block_hash, payload(1)) for block_hash in hashes]

    engine: Any = SimpleNamespace(
        fingerprint=SimpleNamespace(layout=LAYOUT), transfer=SimpleNamespace(export_blocks=export)
    )
    with ThreadPoolExecutor(1) as executor:
        back = WriteBack(engine, access, executor, 10)
        running = asyncio.create_task(back.run())
        back.offer([name(1), name(2)])
        back.offer([name(3), name(4)])
        await eventually(lambda: back.num_stored_blocks == 2)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [str(error) for error in failures] == ["restarting"]
    await channels.close()
    await server.stop(None)
