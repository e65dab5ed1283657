"""What is around the gateway's generations: ids, traces, hang-ups, bounds, small paths, drain."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from prometheus_client import generate_latest

from baton.core.errors import (
    NoWorker,
)
from baton.gateway import server
from baton.gateway.generation import SLOW_WRITE_S
from tests.support.eventually import eventually
from tests.support.gateway_rig import Edge, running_gateway


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


async def test_request_id_is_echoed_and_passed_on(edge):
    response = await edge.raw.post(
        "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine-1"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert edge.fake.requests[0].request_id.startswith("mine-1-")
    assert response.json()["id"] == f"cmpl-{edge.fake.requests[0].request_id}"
    response = await edge.raw.get("/health", headers={"x-request-id": "x" * 200})
    assert response.headers["x-request-id"].startswith("req-")


async def test_trace_goes_from_the_http_caller_to_the_scheduler(edge):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    header = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    await edge.raw.post("/v1/completions", json={"prompt": "x", "model": "demo"}, headers=header)
    [span] = await eventually(edge.spans.get_finished_spans)
    assert span.name == "POST /v1/completions"
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["gen_ai.request.model"] == "demo"
    assert span.attributes["gen_ai.operation.name"] == "text_completion"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    sent = edge.fake.metadata[0]["traceparent"]
    assert sent == f"00-{trace_id}-{span.context.span_id:016x}-01"


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_goes_away_cancels_its_generation(edge, stream):
    edge.fake.hold = asyncio.Event()
    body = {"model": "demo", "prompt": "x", "stream": stream, "n": 2}
    task = asyncio.create_task(edge.raw.post("/v1/completions", json=body))
    await eventually(lambda: edge.fake.num_running == 2)
    task.cancel()
    await eventually(lambda: edge.fake.num_cancelled == 2)
    await eventually(lambda: edge.gateway.num_running == 0)
    text = generate_latest(edge.metrics.registry).decode()
    assert 'route="/v1/completions",status="499"' in text


async def _small_window(edge: Edge, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that takes few bytes at a time, with a stream asked for."""
    host, _, port = edge.url.removeprefix("http://").partition(":")
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    small.connect((host, int(port)))
    reader, writer = await asyncio.open_connection(sock=small, limit=1 << 14)
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def test_slow_reader_gets_fewer_and_larger_chunks_with_every_token(edge):
    edge.fake.words = tuple(f"{number}:{'x' * 30_000};" for number in range(300))
    reader, writer = await _small_window(edge, "/v1/completions")
    assert b"200" in await reader.readline()
    [connection] = edge.http._server.server_state.connections
    full_since_s: list[float] = []

    def has_waited() -> bool:
        if connection.flow.write_paused:
            full_since_s.append(time.monotonic())
        return bool(full_since_s) and time.monotonic() - full_since_s[0] > 2 * SLOW_WRITE_S

    await eventually(has_waited)  # nothing is read until the generation waits for the socket
    lines = [line for line in (await reader.read()).split(b"\n") if line.startswith(b"data: {")]
    writer.close()
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == "".join(edge.fake.words)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) < len(edge.fake.words)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's kernel does it")
async def test_who_reads_nothing_at_all_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "UNREAD_S", 0.3)
    async with running_gateway() as edge:
        edge.fake.words = ("x" * 30_000,) * 1000
        _, writer = await _small_window(edge, "/v1/completions")
        await eventually(lambda: edge.gateway.num_running == 1)
        await eventually(lambda: edge.gateway.num_running == 0, timeout_s=20)
        await eventually(lambda: edge.fake.num_cancelled == 1)
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_generation_has_the_settings_deadline(stream):
    async with running_gateway(request_timeout_s=3) as edge:
        await edge.raw.post("/v1/completions", json={"prompt": "x", "n": 2, "stream": stream})
        assert len(edge.fake.remaining_s) == 2
        assert all(left_s is not None and left_s < 4 for left_s in edge.fake.remaining_s)


async def test_silent_stream_is_pinged(edge):
    edge.fake.hold = asyncio.Event()
    body, last = {"prompt": "x", "stream": True}, ""
    async with edge.raw.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line == ": ping":
                edge.fake.hold.set()
            last = line or last
    assert last == "data: [DONE]"


async def test_too_many_requests_are_refused(edge):
    edge.fake.hold = asyncio.Event()
    edge.gateway._settings = edge.gateway._settings.model_copy(
        update={"max_concurrent_requests": 1}
    )
    body = {"prompt": "x"}
    task = asyncio.create_task(edge.raw.post("/v1/completions", json=body))
    await eventually(lambda: edge.gateway.num_running == 1)
    response = await edge.raw.post("/v1/completions", json=body)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    edge.fake.hold.set()
    assert (await task).status_code == 200


async def test_health_readiness_version_and_unknown_paths(edge):
    assert (await edge.raw.get("/health")).json() == {"status": "ok"}
    assert (await edge.raw.get("/ready")).json() == {"status": "ready", "models": ["demo"]}
    edge.fake.before.append(NoWorker("starting"))
    assert (await edge.raw.get("/ready")).status_code == 503
    edge.gateway.is_draining = True
    assert (await edge.raw.get("/ready")).json()["reason"] == "draining"
    assert "version" in (await edge.raw.get("/version")).json()
    missing = await edge.raw.get("/v2/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (await edge.raw.get("/v1/completions")).status_code == 405


async def test_metrics_are_not_on_the_port_of_the_api(edge):
    assert (await edge.raw.get("/metrics")).status_code == 404


async def _status_for(edge: Edge, host: str) -> int:
    return (await edge.raw.get("/health", headers={"host": host})).status_code


async def test_a_loopback_gateway_serves_loopback_names_and_those_listed():
    async with running_gateway(allowed_hosts="llm.example") as edge:
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LLM.example:80"):
            assert await _status_for(edge, host) == 200, host
        for host in ("rebound.example", "localhost.rebound.example", "10.0.0.1", "[::1"):
            assert await _status_for(edge, host) == 400, host


@pytest.mark.parametrize(("listed", "status"), [("", 200), ("llm.example", 400)])
async def test_a_public_gateway_serves_any_name_unless_some_are_listed(listed, status):
    async with running_gateway(http_host="0.0.0.0", allowed_hosts=listed) as edge:
        assert await _status_for(edge, "any.example") == status


async def test_tokenize_and_detokenize(edge):
    response = await edge.raw.post("/tokenize", json={"prompt": "ab"})
    assert response.json() == {"count": 2, "tokens": [97, 98]}
    response = await edge.raw.post("/detokenize", json={"tokens": [97, 98]})
    assert response.json() == {"prompt": "ab"}


async def test_answers_do_not_wait_for_delayed_acknowledgements(edge):
    elapsed_s = []
    for _ in range(20):
        started_s = time.monotonic()
        await edge.raw.post("/tokenize", json={"prompt": "ab"})
        elapsed_s.append(time.monotonic() - started_s)
    assert min(elapsed_s) < 0.03


async def test_drain_lets_running_streams_end_and_refuses_new_connections(edge):
    edge.fake.hold = asyncio.Event()
    stream = await edge.client.completions.create(model="demo", prompt="x", stream=True)
    drain = asyncio.create_task(edge.http.drain(10.0))

    async def is_closed() -> bool:
        async with httpx.AsyncClient() as fresh:
            try:
                await fresh.get(f"{edge.url}/health")
            except httpx.ConnectError:
                return True
        return False

    await eventually(is_closed)
    edge.fake.hold.set()
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello wörld!"
    await asyncio.wait_for(drain, 5)


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


async def test_pages_of_named_origins_may_call_and_others_may_not():
    async with running_gateway(cors_origins="https://a.example") as edge:
        asked = await edge.raw.options("/v1/completions", headers=PREFLIGHT)
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        answer = await edge.raw.get("/v1/models", headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await edge.raw.get("/v1/models", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_without_named_origins_browsers_are_told_nothing(edge):
    asked = await edge.raw.options("/v1/completions", headers=PREFLIGHT)
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models"])
async def test_head_is_get_without_a_body(edge, path):
    response = await edge.raw.head(path)
    assert (response.status_code, response.content) == (200, b"")
