"""Whatever ends a call is a BatonError for its caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.core.errors import BatonError, KvChecksum, NoWorker, WorkerDraining
from baton.wire import calls
from baton.wire.errors import rpc_errors, trailing_metadata


@asynccontextmanager
async def echo(end: BatonError | None) -> AsyncIterator[grpc.aio.Channel]:
    """A server whose streams end after one message."""

    async def answer(requests: AsyncIterator[bytes], context: Any) -> bytes:
        await anext(requests)
        if end is not None:
            code = grpc.StatusCode.DATA_LOSS
            await context.abort(code, end.message, trailing_metadata(end))
        return b"early"

    server = grpc.aio.server()
    handlers = {"Echo": grpc.stream_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.mark.parametrize(
    ("end", "expected"), [(KvChecksum("damaged"), KvChecksum), (None, WorkerDraining)]
)
async def test_write_on_a_call_that_the_peer_ended_says_why(
    end: BatonError | None, expected: type[BatonError]
) -> None:
    async with echo(end) as channel:
        call = channel.stream_unary("/t/Echo")()
        await calls.write(call, b"one")
        await call.code()
        with pytest.raises(expected, match="damaged" if end else "ended"):
            await calls.write(call, b"two")


async def test_call_on_a_closed_channel_is_a_lost_worker() -> None:
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    method = channel.unary_unary("/t/Unary")
    await channel.close()
    with pytest.raises(NoWorker, match="closed"):
        await calls.ask(method, b"", 1.0)
    with pytest.raises(NoWorker), rpc_errors():
        channel.unary_unary("/t/Unary")(b"")
