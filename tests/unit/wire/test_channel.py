"""Channels to peers that are gone are closed, and no call is cut off by that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.core.cluster import Announcement, ClusterView, ServiceState, ServiceStatus
from baton.core.errors import NoWorker
from baton.core.roles import Role
from baton.rpc.warm_channels import WarmChannels
from baton.wire import calls
from baton.wire.channel import ChannelPool
from baton.wire.control import RpcControl, add_control
from tests.support.eventually import eventually

NUM_BLOCKS = 240_000


@asynccontextmanager
async def serving(add: Any) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def pool() -> AsyncIterator[ChannelPool]:
    pool = ChannelPool(max_message_bytes=4 << 20)
    yield pool
    await pool.close()


async def test_discarded_channel_ends_its_calls_first(pool: ChannelPool) -> None:
    go_on = asyncio.Event()

    async def answer(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"one"
        await go_on.wait()
        yield b"two"

    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(answer)}
    service = grpc.method_handlers_generic_handler("t", handlers)
    async with serving(lambda server: server.add_generic_rpc_handlers((service,))) as address:
        channel = pool.get(address)
        method: Any = channel.unary_stream("/t/Stream")
        call = method(b"")
        assert await calls.read(call) == b"one"
        pool.discard(address)
        assert pool.get(address) is not channel
        go_on.set()
        assert [await calls.read(call), await calls.read(call)] == [b"two", None]
        await eventually(lambda: not pool._closing)
        with pytest.raises(NoWorker, match="closed"):
            await calls.ask(channel.unary_unary("/t/Unary"), b"", 1.0)


async def test_pool_closes_while_a_discarded_channel_still_has_a_call(pool: ChannelPool) -> None:
    async def answer(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.Event().wait()

    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(answer)}
    service = grpc.method_handlers_generic_handler("t", handlers)
    async with serving(lambda server: server.add_generic_rpc_handlers((service,))) as address:
        method: Any = pool.get(address).unary_stream("/t/Stream")
        call = method(b"")
        assert await calls.read(call) == b"one"
        pool.discard(address)
        async with asyncio.timeout(5):
            await pool.close()
        assert call.done()


async def test_member_that_is_gone_is_not_dialled_any_more(pool: ChannelPool) -> None:
    def view(*addresses: str) -> ClusterView:
        found = ClusterView()
        for address in addresses:
            status = ServiceStatus(f"d-{address}", "decode", address, state=ServiceState.READY)
            found = found.announced(Announcement(status, 3.0), 0.0)
        return found

    warm = WarmChannels(pool, frozenset({Role.DECODE}))
    warm.on_members(view("127.0.0.1:1", "127.0.0.1:2"))
    gone, kept = (pool.get(f"127.0.0.1:{port}") for port in (1, 2))
    warm.on_members(view("127.0.0.1:2"))
    await eventually(lambda: gone.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
    assert pool.get("127.0.0.1:2") is kept
    assert kept.get_state() is not grpc.ChannelConnectivity.SHUTDOWN


class _Worker:
    """A worker with more blocks than fit the usual message."""

    def describe(self) -> Announcement:
        status = ServiceStatus("w1", "decode", "x:1", state=ServiceState.READY)
        return Announcement(status, lease_s=1.0)

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        return 7, [number.to_bytes(16, "big") for number in range(NUM_BLOCKS)]

    def request_stop(self, grace_s: float | None) -> None:
        raise NotImplementedError


async def test_snapshot_of_many_blocks_exceeds_no_limit(pool: ChannelPool) -> None:
    async with serving(lambda server: add_control(server, _Worker())) as address:
        snapshot = await RpcControl(pool).kv_snapshot(address, num_blocks=NUM_BLOCKS)
    assert (snapshot.worker_id, snapshot.sequence) == ("w1", 7)
    assert len(snapshot.block_hashes) == NUM_BLOCKS
