"""CacheService over real gRPC, spoken to with plain protobuf stubs as any peer would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import grpc
import pytest
import xxhash

from baton.cache.store import BLOCK_OVERHEAD_BYTES
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    KvCacheFull,
    KvChecksum,
    KvLayoutMismatch,
    Stalled,
)
from baton.v1 import cache_pb2, cache_pb2_grpc, common_pb2
from baton.wire.errors import rpc_errors
from tests.support.cache_process import Cache

LAYOUT = common_pb2.KvLayout(block_size=16, dtype="float32", num_kv_heads=[2, 2], head_dim=[8, 8])
BLOCK_BYTES = 2 * 16 * 4 * (16 + 16)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int) -> bytes:
    return bytes([number]) * BLOCK_BYTES


def blocks(
    numbers: Iterable[int], *, corrupt: int | None = None
) -> Iterable[cache_pb2.StoreBlocksRequest]:
    for position, number in enumerate(numbers):
        data = payload(number)
        header = cache_pb2.BlockHeader(
            block_hash=name(number), checksum=xxhash.xxh3_64_intdigest(data)
        )
        if position == 0:
            header.layout.CopyFrom(LAYOUT)
        if number == corrupt:
            data = b"\x00" + data[1:]
        yield cache_pb2.StoreBlocksRequest(header=header, payload=data)


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    running = Cache(8 * (BLOCK_BYTES + BLOCK_OVERHEAD_BYTES), pinned_bytes=6 * BLOCK_BYTES)
    await running.server.start()
    yield running
    await running.server.stop(None)


@pytest.fixture
async def stub(cache: Cache) -> AsyncIterator[cache_pb2_grpc.CacheServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cache.port}") as channel:
        yield cache_pb2_grpc.CacheServiceStub(channel)


async def store(
    stub: cache_pb2_grpc.CacheServiceStub, numbers: Iterable[int], *, corrupt: int | None = None
) -> cache_pb2.StoreBlocksResponse:
    with rpc_errors():
        answer: cache_pb2.StoreBlocksResponse = await stub.StoreBlocks(
            iter(blocks(numbers, corrupt=corrupt)), timeout=5
        )
    return answer


async def fetch(
    stub: cache_pb2_grpc.CacheServiceStub, numbers: Iterable[int]
) -> list[cache_pb2.FetchBlocksResponse]:
    request = cache_pb2.FetchBlocksRequest(block_hashes=[name(number) for number in numbers])
    with rpc_errors():
        return [response async for response in stub.FetchBlocks(request, timeout=5)]


async def test_blocks_come_back_in_order_up_to_the_first_missing(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    stored = await store(stub, [1, 2, 3])
    assert (stored.num_stored, stored.num_skipped) == (3, 0)
    fetched = await fetch(stub, [1, 2, 9, 3])
    assert [response.header.block_hash for response in fetched] == [name(1), name(2)]
    assert [response.payload for response in fetched] == [payload(1), payload(2)]
    assert fetched[0].header.layout == LAYOUT
    assert fetched[1].header.checksum == xxhash.xxh3_64_intdigest(payload(2))
    assert cache.value("cache_fetched_blocks", outcome="hit") == 2
    assert cache.value("cache_fetched_blocks", outcome="miss") == 1
    assert cache.value("cache_fetched_bytes") == 2 * BLOCK_BYTES


async def test_stored_blocks_are_skipped_the_second_time(
    stub: cache_pb2_grpc.CacheServiceStub,
) -> None:
    await store(stub, [1, 2])
    again = await store(stub, [1, 2, 3])
    assert (again.num_stored, again.num_skipped) == (1, 2)


async def test_corrupt_block_is_refused_and_those_before_it_stay(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    with pytest.raises(KvChecksum):
        await store(stub, [1, 2, 3], corrupt=2)
    assert len(cache.store.memory) == 1
    assert cache.value("cache_stored_blocks", outcome="refused") == 1
    assert [response.payload for response in await fetch(stub, [1, 2])] == [payload(1)]


async def test_lookup_knows_the_store_and_the_workers(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    await store(stub, [1])
    cache.index.apply("w1", 1, [name(1), name(2)], [])
    request = cache_pb2.LookupPrefixRequest(block_hashes=[name(1), name(2), name(3)])
    found = await stub.LookupPrefix(request, timeout=5)
    assert found.num_stored_blocks == 1
    assert [(holder.worker_id, holder.num_blocks) for holder in found.holders] == [("w1", 2)]


async def test_budget_holds_and_evictions_are_counted(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    await store(stub, range(1, 13))
    memory = cache.store.memory
    assert len(memory) == 8
    assert memory.used_bytes <= memory.memory_bytes
    assert cache.value("cache_evicted_blocks", tier="memory") == 4


async def test_drop_empties_the_store(stub: cache_pb2_grpc.CacheServiceStub) -> None:
    await store(stub, [1, 2])
    assert (await stub.DropBlocks(cache_pb2.DropBlocksRequest(), timeout=5)).num_dropped == 2
    assert await fetch(stub, [1]) == []


async def test_silent_store_call_is_ended(stub: cache_pb2_grpc.CacheServiceStub) -> None:
    call = stub.StoreBlocks(timeout=5)
    await call.write(next(iter(blocks([1]))))
    with pytest.raises(Stalled), rpc_errors():
        await call


def without_layout() -> list[cache_pb2.StoreBlocksRequest]:
    (request,) = blocks([1])
    request.header.ClearField("layout")
    return [request]


def wrong_size() -> list[cache_pb2.StoreBlocksRequest]:
    (request,) = blocks([1])
    request.payload = request.payload[:-4]
    return [request]


def short_hash() -> list[cache_pb2.StoreBlocksRequest]:
    (request,) = blocks([1])
    request.header.block_hash = b"short"
    return [request]


@pytest.mark.parametrize(
    ("make_requests", "error"),
    [
        (without_layout, InvalidRequest),
        (wrong_size, KvLayoutMismatch),
        (short_hash, InvalidRequest),
        (lambda: list(blocks([1] * 65)), InvalidRequest),
    ],
)
async def test_bad_blocks_get_typed_errors_and_serving_goes_on(
    stub: cache_pb2_grpc.CacheServiceStub, make_requests: object, error: type[BatonError]
) -> None:
    with pytest.raises(error), rpc_errors():
        await stub.StoreBlocks(iter(make_requests()), timeout=5)  # type: ignore[operator]
    assert (await store(stub, [4])).num_stored == 1


@pytest.mark.parametrize("hashes", [[], [b"short"], [name(1)] * 65])
async def test_bad_hashes_are_refused(
    stub: cache_pb2_grpc.CacheServiceStub, hashes: list[bytes]
) -> None:
    with pytest.raises(InvalidRequest), rpc_errors():
        await stub.LookupPrefix(cache_pb2.LookupPrefixRequest(block_hashes=hashes), timeout=5)
    with pytest.raises(InvalidRequest), rpc_errors():
        async for _ in stub.FetchBlocks(
            cache_pb2.FetchBlocksRequest(block_hashes=hashes), timeout=5
        ):
            pass


async def test_garbage_instead_of_a_frame_is_refused(cache: Cache) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cache.port}") as channel:
        call = channel.stream_unary("/baton.v1.CacheService/StoreBlocks", None, None)
        for garbage in (b"\x0a\x7f", b"\x0a\x02\xff\xff"):
            with pytest.raises(InvalidRequest), rpc_errors():
                await call(iter([garbage]), timeout=5)


async def test_pinned_blocks_stay_whatever_comes(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    await store(stub, [1, 2])
    request = cache_pb2.PinBlocksRequest(
        block_hashes=[name(1), name(2), name(3)], block_bytes=BLOCK_BYTES, label="system"
    )
    request.ttl.FromSeconds(50)
    pin = (await stub.PinBlocks(request, timeout=5)).pin
    assert (pin.num_blocks, pin.num_stored_blocks, pin.bytes) == (3, 2, 3 * BLOCK_BYTES)
    await store(stub, range(3, 20))
    found = await stub.LookupPrefix(
        cache_pb2.LookupPrefixRequest(block_hashes=request.block_hashes), timeout=5
    )
    assert found.num_stored_blocks == 3
    (listed,) = (await stub.ListPins(cache_pb2.ListPinsRequest(), timeout=5)).pins
    assert (listed.pin_id, listed.label, listed.num_stored_blocks) == (pin.pin_id, "system", 3)
    assert listed.remaining.ToSeconds() == 50

    request.block_hashes.extend(name(number) for number in range(30, 34))
    with pytest.raises(KvCacheFull), rpc_errors():
        await stub.PinBlocks(request, timeout=5)
    unpin = cache_pb2.UnpinBlocksRequest(pin_id=pin.pin_id)
    assert (await stub.UnpinBlocks(unpin, timeout=5)).found
    assert not (await stub.UnpinBlocks(unpin, timeout=5)).found
    await store(stub, range(40, 60))
    assert not any(name(number) in cache.store for number in (1, 2, 3))


async def test_answers_are_kept_as_they_are(
    cache: Cache, stub: cache_pb2_grpc.CacheServiceStub
) -> None:
    key = b"k" * 32
    lookup = cache_pb2.LookupAnswerRequest(key=key)
    assert (await stub.LookupAnswer(lookup, timeout=5)).answer == b""
    request = cache_pb2.StoreAnswerRequest(key=key, answer=b"answer")
    assert (await stub.StoreAnswer(request, timeout=5)).stored
    assert (await stub.LookupAnswer(lookup, timeout=5)).answer == b"answer"
    assert cache.value("cache_answers", outcome="hits") == 1
    cache.now = 60.0
    assert (await stub.LookupAnswer(lookup, timeout=5)).answer == b""
    too_large = cache_pb2.StoreAnswerRequest(key=key, answer=bytes(4096))
    assert not (await stub.StoreAnswer(too_large, timeout=5)).stored
    with pytest.raises(InvalidRequest), rpc_errors():
        await stub.LookupAnswer(cache_pb2.LookupAnswerRequest(key=b"short"), timeout=5)
