"""CacheService over real gRPC, spoken to with plain protobuf stubs as any peer would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import grpc
import pytest
import xxhash

from baton.cache.metrics import make_metrics
from baton.cache.servicer import CacheLimits, CacheServicer
from baton.cache.store import BLOCK_OVERHEAD_BYTES
from baton.cache.tiers import TieredStore
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    KvChecksum,
    KvLayoutMismatch,
    Stalled,
)
from baton.core.prefix_index import PrefixIndex
from baton.rpc.errors import rpc_errors
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.v1 import cache_pb2, cache_pb2_grpc, common_pb2

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


class Cache:
    def __init__(self, memory_bytes: int) -> None:
        self.store = TieredStore(memory_bytes)
        self.index = PrefixIndex()
        self.metrics = Metrics("cache", "c1", "0")
        servicer = CacheServicer(
            self.store,
            self.index,
            CacheLimits(max_prefix_blocks=64, stall_timeout_s=0.2),
            make_metrics(self.metrics, self.store),
        )
        telemetry = Telemetry("cache", "c1")
        self.server = grpc.aio.server(interceptors=[ServerInterceptor(telemetry, self.metrics)])
        self.server.add_generic_rpc_handlers((servicer.handlers(),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def value(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"baton_{metric}_total", labels) or 0.0


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    running = Cache(8 * (BLOCK_BYTES + BLOCK_OVERHEAD_BYTES))
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
