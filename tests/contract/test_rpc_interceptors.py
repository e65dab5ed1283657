"""What every RPC gets: mapped errors, a span, a metric; on all four kinds, on every way to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from baton.core.errors import (
    BatonError,
    Internal,
    InvalidRequest,
    KvCacheFull,
    NoWorker,
    QueueFull,
)
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.server import create_server, listen
from baton.rpc.settings import ServiceSettings
from baton.rpc.telemetry import Telemetry, trace_id_hex
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.errors import error_from_rpc, rpc_errors
from tests.support.eventually import eventually

SERVICE = "test.v1.EchoService"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Echo(grpc.GenericRpcHandler):
    """Raw handlers of all four kinds that do what the request says."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.hanging = asyncio.Event()
        self.context_trace = ""
        self.telemetry: Telemetry | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        kind = handler_call_details.method.rsplit("/", 1)[-1]
        if kind not in KINDS:
            return None
        return getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, kind))

    async def _act(self, request: bytes) -> bytes:
        assert self.telemetry is not None
        self.context_trace = self.telemetry.inject().get("traceparent", "")
        if request == b"full":
            raise KvCacheFull("9 blocks are free, 10 are needed", retry_after_s=0.5)
        if request == b"bug":
            raise ValueError("secret prompt text")
        if request == b"gone":
            raise grpc.aio.InternalError('Failed "execute_batch"')
        if request == b"hang":
            self.hanging.set()
            await asyncio.Event().wait()
        return request

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        if request == b"abort":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "own abort")
        return await self._act(request)

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if request == b"flood":
                while True:
                    yield b"x" * 65536
            yield await self._act(request)
        finally:
            self.closed.set()

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([await self._act(request) async for request in requests])

    async def stream_stream(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        async for request in requests:
            yield await self._act(request)


@dataclass
class Rig:
    """A server, a channel to it, and what it exports."""

    echo: Echo
    channel: grpc.aio.Channel
    telemetry: Telemetry
    metrics: Metrics
    exporter: InMemorySpanExporter
    gate: list[BatonError] = field(default_factory=list)

    async def call(self, kind: str, request: bytes, timeout_s: float = 10.0) -> list[bytes]:
        """Makes a call; returns all answers."""
        start = getattr(self.channel, kind)(f"/{SERVICE}/{kind}")
        argument = request if kind.startswith("unary") else iter([request])
        call = start(argument, timeout=timeout_s)
        try:
            if kind.endswith("unary"):
                return [await call]
            return [answer async for answer in call]
        finally:
            # Leaving a stream's `async for` does not always cancel the call.
            call.cancel()

    async def span(self) -> ReadableSpan:
        """The one server span."""
        await eventually(lambda: len(self._server_spans()) == 1)
        return self._server_spans()[0]

    def _server_spans(self) -> list[ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        return [span for span in spans if span.kind is SpanKind.SERVER]

    def count(self, kind: str, status: str) -> float:
        """Calls counted with this status."""
        labels = {"rpc_method": f"{SERVICE}/{kind}", "status": status}
        name = "baton_rpc_server_call_duration_seconds_count"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def inflight(self, kind: str) -> float:
        """Calls being served."""
        labels = {"rpc_method": f"{SERVICE}/{kind}"}
        return self.metrics.registry.get_sample_value("baton_rpc_server_inflight", labels) or 0.0


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry("echo", "echo-1", processors=(SimpleSpanProcessor(exporter),))
    metrics = Metrics("echo", "echo-1", "0")
    echo = Echo()
    echo.telemetry = telemetry
    gate: list[BatonError] = []
    interceptor = ServerInterceptor(
        telemetry, metrics, SystemClock(), lambda *_: gate[0] if gate else None
    )
    settings = ServiceSettings(port=0)
    server = create_server(settings, [interceptor])
    server.add_generic_rpc_handlers((echo,))
    port = listen(server, settings)
    await server.start()
    pool = ChannelPool(max_message_bytes=settings.max_message_bytes, inject=telemetry.inject)
    yield Rig(echo, pool.get(f"127.0.0.1:{port}"), telemetry, metrics, exporter, gate)
    await pool.close()
    await server.stop(None)


@pytest.mark.parametrize("kind", KINDS)
async def test_success_has_a_span_and_a_metric(rig: Rig, kind: str) -> None:
    answers = await rig.call(kind, b"hello")
    assert answers[-1] == b"hello"
    span = await rig.span()
    assert span.name == f"{SERVICE}/{kind}"
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.status.status_code is StatusCode.UNSET
    assert rig.count(kind, "OK") == 1
    assert rig.inflight(kind) == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_the_callers_trace_goes_on_in_the_handler(rig: Rig, kind: str) -> None:
    parent = rig.telemetry.start_span("client")
    rig.telemetry.set_current(rig.telemetry.context_of(parent))
    await rig.call(kind, b"hello")
    span = await rig.span()
    assert span.parent is not None
    assert span.parent.span_id == parent.get_span_context().span_id
    assert rig.echo.context_trace.split("-")[1] == trace_id_hex(parent)
    own = span.get_span_context()
    assert own is not None
    assert rig.echo.context_trace.split("-")[2] == f"{own.span_id:016x}"


async def test_traces_of_calls_do_not_mix(rig: Rig) -> None:
    for _ in range(2):
        await rig.call("stream_stream", b"hello")
    await eventually(lambda: len(rig.exporter.get_finished_spans()) == 2)
    contexts = [span.get_span_context() for span in rig.exporter.get_finished_spans()]
    assert len({context.trace_id for context in contexts if context}) == 2
    assert all(span.parent is None for span in rig.exporter.get_finished_spans())


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_keeps_its_reason_and_delay(rig: Rig, kind: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.call(kind, b"full")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(caught.value)
    assert isinstance(error, KvCacheFull)
    assert error.message == "9 blocks are free, 10 are needed"
    assert error.retry_after_s == 0.5
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["baton.error.reason"] == "KV_CACHE_FULL"
    assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert rig.count(kind, "RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unexpected_error_is_logged_once_and_hidden(
    rig: Rig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(Internal) as caught, rpc_errors():
        await rig.call(kind, b"bug")
    assert "secret" not in caught.value.message
    records = [record for record in caplog.records if record.name.startswith("baton")]
    assert [record.getMessage() for record in records] == ["rpc failed"]
    assert records[0].__dict__["error_type"] == "ValueError"
    everything = [str(record.__dict__) for record in caplog.records]
    assert not any("prompt text" in text and "raise ValueError" not in text for text in everything)
    span = await rig.span()
    assert span.status.status_code is StatusCode.ERROR


async def test_a_handlers_own_abort_passes(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.call("unary_unary", b"abort")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await rig.span()
    assert rig.count("unary_unary", "FAILED_PRECONDITION") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_call_ends_its_span(rig: Rig, kind: str) -> None:
    task = asyncio.create_task(rig.call(kind, b"hang"))
    await asyncio.wait_for(rig.echo.hanging.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert rig.count(kind, "CANCELLED") == 1
    assert rig.inflight(kind) == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_an_expired_deadline_ends_its_span(rig: Rig, kind: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.call(kind, b"hang", timeout_s=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"


async def test_a_generator_is_closed_when_its_reader_goes_away_during_a_write(rig: Rig) -> None:
    call = rig.channel.unary_stream(f"/{SERVICE}/unary_stream")(b"flood", timeout=10)
    await call.read()
    call.cancel()
    await asyncio.wait_for(rig.echo.closed.wait(), 5)
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_a_write_that_meets_the_calls_end_counts_as_cancelled(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await rig.call("unary_stream", b"gone", timeout_s=0.5)
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert "rpc failed" not in [record.getMessage() for record in caplog.records]


async def test_the_gate_refuses_with_its_reason(rig: Rig) -> None:
    rig.gate.append(NoWorker("the service is still loading", retry_after_s=1.0))
    with pytest.raises(NoWorker, match="still loading"), rpc_errors():
        await rig.call("unary_stream", b"hello")
    assert not rig.echo.closed.is_set()
    rig.gate.clear()
    assert await rig.call("unary_stream", b"hello") == [b"first", b"hello"]


async def test_an_unknown_method_is_unimplemented(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.channel.unary_unary(f"/{SERVICE}/nope")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def _serve(settings: ServiceSettings) -> tuple[grpc.aio.Server, str]:
    echo = Echo()
    echo.telemetry = Telemetry("echo", "echo-1")
    interceptor = ServerInterceptor(echo.telemetry, Metrics("echo", "echo-1", "0"), SystemClock())
    server = create_server(settings, [interceptor])
    server.add_generic_rpc_handlers((echo,))
    port = listen(server, settings)
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_a_message_of_100_mb_is_refused_and_does_no_harm() -> None:
    server, address = await _serve(ServiceSettings())
    pool = ChannelPool(max_message_bytes=4 * 1024 * 1024)
    try:
        with pytest.raises(InvalidRequest, match="too large"), rpc_errors():
            await pool.get(address).unary_unary(f"/{SERVICE}/unary_unary")(
                bytes(100_000_000), timeout=20
            )
        answer = await pool.get(address).unary_unary(f"/{SERVICE}/unary_unary")(b"ok", timeout=5)
        assert answer == b"ok"
    finally:
        await pool.close()
        await server.stop(None)


async def test_more_calls_than_allowed_are_refused() -> None:
    server, address = await _serve(ServiceSettings(max_concurrent_rpcs=1))
    pool = ChannelPool(max_message_bytes=4 * 1024 * 1024)
    try:
        start = pool.get(address).unary_stream(f"/{SERVICE}/unary_stream")
        first = start(b"hang", timeout=10)
        assert await first.read() == b"first"
        with pytest.raises(QueueFull), rpc_errors():
            await start(b"hello", timeout=5).read()
        first.cancel()
    finally:
        await pool.close()
        await server.stop(None)


async def test_a_taken_port_is_an_error() -> None:
    server, address = await _serve(ServiceSettings())
    try:
        taken = ServiceSettings(port=int(address.rsplit(":", 1)[1]))
        with pytest.raises(RuntimeError):
            listen(create_server(taken), taken)
    finally:
        await server.stop(None)


async def test_a_killed_peers_channel_connects_again() -> None:
    server, address = await _serve(ServiceSettings())
    pool = ChannelPool(max_message_bytes=4 * 1024 * 1024)

    async def works() -> bool:
        try:
            with rpc_errors():
                await pool.get(address).unary_unary(f"/{SERVICE}/unary_unary")(b"x", timeout=2)
        except BatonError as error:
            assert isinstance(error, NoWorker)  # noqa: PT017
            return False
        return True

    try:
        assert await works()
        await server.stop(None)
        assert not await works()
        settings = ServiceSettings(port=int(address.rsplit(":", 1)[1]))
        server, _ = await _serve(settings)
        await eventually(works, timeout_s=10)
    finally:
        await pool.close()
        await server.stop(None)
