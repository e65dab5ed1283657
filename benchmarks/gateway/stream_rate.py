"""How many server-sent chunks a second one core of gateway writes."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from dataclasses import dataclass

import grpc.aio
import psutil

from baton.v1 import inference_pb2
from benchmarks.gateway.mock import METHOD
from benchmarks.gateway.processes import Front

TIMEOUT_S = 120.0
_MARK = b"data: {"
_END = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class StreamRate:
    """Over all streams together."""

    chunks_per_s: float
    chunks_per_cpu_s: float
    """By the gateway's own processor time: what others do on the machine does not count."""
    mock_messages_per_s: float
    """Read from the mock directly by as many gRPC streams: what is in front cannot be faster."""


class _Reader(asyncio.Protocol):
    """Counts chunks without looking into them."""

    def __init__(self, request: bytes, ended: asyncio.Future[int]) -> None:
        self._request = request
        self._ended = ended
        self._num_chunks = 0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks."""
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Counts; a mark may be cut in two."""
        seen = self._rest + data
        self._num_chunks += seen.count(_MARK)
        if _END in seen and not self._ended.done():
            self._ended.set_result(self._num_chunks)
        self._rest = seen[-len(_END) + 1 :] if _MARK not in seen[-len(_END) + 1 :] else b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Too early, unless the end was seen."""
        if not self._ended.done():
            self._ended.set_exception(exc or ConnectionError("the gateway hung up"))


def _request(front: Front, num_tokens: int) -> bytes:
    body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {front.host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _read_gateway(front: Front, num_streams: int, num_tokens: int) -> int:
    loop = asyncio.get_running_loop()
    request = _request(front, num_tokens)
    ends: list[asyncio.Future[int]] = [loop.create_future() for _ in range(num_streams)]
    transports = [
        (
            await loop.create_connection(
                functools.partial(_Reader, request, end), front.host, front.port
            )
        )[0]
        for end in ends
    ]
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return sum(await asyncio.gather(*ends))
    finally:
        for transport in transports:
            transport.close()
        await asyncio.sleep(0)  # closing takes a turn of the loop


async def _read_mock(scheduler: str, num_streams: int, num_tokens: int) -> int:
    request = inference_pb2.GenerateRequest(text="x")
    request.sampling.max_tokens = num_tokens
    async with grpc.aio.insecure_channel(scheduler) as channel:
        ask = channel.unary_stream(METHOD, inference_pb2.GenerateRequest.SerializeToString, None)

        async def read() -> int:
            return sum([1 async for _ in ask(request, timeout=TIMEOUT_S)])

        return sum(await asyncio.gather(*(read() for _ in range(num_streams))))


def measure_stream_rate(
    scheduler: str, front: Front, num_streams: int, num_tokens: int
) -> StreamRate:
    """Reads `num_streams` streams of `num_tokens` chunks side by side, after a short warm-up."""
    asyncio.run(_read_gateway(front, num_streams, 32))
    process = psutil.Process(front.pid)
    before, started_s = process.cpu_times(), time.perf_counter()
    num_chunks = asyncio.run(_read_gateway(front, num_streams, num_tokens))
    took_s, after = time.perf_counter() - started_s, process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    started_s = time.perf_counter()
    num_messages = asyncio.run(_read_mock(scheduler, num_streams, num_tokens))
    mock_s = time.perf_counter() - started_s
    return StreamRate(num_chunks / took_s, num_chunks / max(cpu_s, 1e-3), num_messages / mock_s)
