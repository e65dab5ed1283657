"""Bounds on what a connection to the gateway may hold: heads, trailers, time, and their number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.gateway import http_protocol
from tests.support.eventually import eventually
from tests.support.gateway_rig import Edge, running_gateway

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
MOST_BYTES = 2 * 1024 * 1024


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


async def connect(edge: Edge) -> Streams:
    host, _, port = edge.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def flood(streams: Streams, piece: bytes) -> int:
    """Sends `piece` until the connection is closed; returns how many bytes went out."""
    reader, writer = streams
    num_bytes = 0
    try:
        while num_bytes < MOST_BYTES and not reader.at_eof():
            writer.write(piece)
            num_bytes += len(piece)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    return num_bytes


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"a" * 8192),
        (GET + b"x: ", b"a" * 8192),
        (GET, b"x: y\r\n" * 1000),
        (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ", b"a" * 8192),
    ],
    ids=["path", "one header", "many headers", "trailer"],
)
async def test_a_head_without_end_is_cut_off(edge: Edge, begin: bytes, piece: bytes) -> None:
    streams = await connect(edge)
    streams[1].write(begin)
    assert await flood(streams, piece) < MOST_BYTES
    await eventually(lambda: not edge.http._server.server_state.connections)
    assert (await edge.raw.get("/health")).status_code == 200


async def test_a_head_that_is_too_large_gets_an_answer(edge: Edge) -> None:
    reader, writer = await connect(edge)
    writer.write(GET + b"x: " + b"a" * (http_protocol.MAX_HEAD_BYTES + 1))
    assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
    writer.close()


@pytest.mark.parametrize(
    "begin",
    [b"", GET, GET + b"\r\n" + GET, b"\r\n", GET + b"content-length: 9\r\n\r\n"],
    ids=["nothing", "first head", "second head", "blank lines", "body after its response"],
)
async def test_a_request_that_does_not_arrive_in_time_is_cut_off(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    reader, writer = await connect(edge)
    writer.write(begin)
    async with asyncio.timeout(10):
        while not reader.at_eof():
            await reader.read(1000)
            if begin.endswith(b"\n"):
                writer.write(b"\r\n" if begin == b"\r\n" else b"x")
    writer.close()


async def test_a_long_answer_outlasts_the_time_for_a_head(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)
    edge.fake.hold = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, edge.fake.hold.set)
    response = await edge.raw.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")


async def test_connections_are_bounded() -> None:
    async with running_gateway(max_connections=2) as edge:
        first, second, third = [await connect(edge) for _ in range(3)]
        assert (await third[0].readline()).startswith(b"HTTP/1.1 503 ")
        first[1].write(GET + b"\r\n")
        assert (await first[0].readline()).startswith(b"HTTP/1.1 200 ")
        second[1].close()

        async def is_free() -> bool:
            return (await edge.raw.get("/health")).status_code == 200

        await eventually(is_free)
        for _, writer in (first, third):
            writer.close()
