"""What happens around every RPC that this process serves: trace, metrics, errors. One wrapper.

All four kinds of RPC pass here, raw generic handlers too. A streaming handler's async generator is
driven and closed by the wrapper, so that its `finally` blocks run when the RPC ends and not when
the garbage collector finds it. A span ends on every path: return, error, abort, cancel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from baton.core.clock import Clock
from baton.core.errors import BatonError, Internal, InvalidRequest
from baton.rpc.logs import bind_request_id, log_failure
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.errors import CATALOGUE, error_from_rpc, public_message, trailing_metadata

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "baton-request-id"
"""Metadata: the request that a call is made for."""
UNTRACED = ("grpc.health.", "grpc.reflection.", "baton.v1.ControlService/")
"""Calls that come every second: no spans. They are served while the process starts, too."""
DRAIN = "baton.v1.ControlService/Drain"
"""The one among them that changes something: a service may refuse it."""
# Source: OpenTelemetry semantic conventions for gRPC: other statuses are the caller's.
_SERVER_ERRORS = frozenset({
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
})
_CODES = {code.value[0]: code for code in grpc.StatusCode}
Gate = Callable[[str, Mapping[str, str]], BatonError | None]
"""Says why a call is refused, if it is, from its method and metadata."""
_Context = grpc.aio.ServicerContext[Any, Any]


class ServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler. `gate` may refuse calls, but of those in `UNTRACED` only `DRAIN`."""

    def __init__(
        self, telemetry: Telemetry, metrics: Metrics, clock: Clock, gate: Gate | None = None
    ) -> None:
        self._telemetry = telemetry
        self._metrics = metrics
        self.clock = clock
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler with the wrapper around it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.lstrip("/")
        arity = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
        behavior = getattr(handler, arity)
        # Parsed here and not by gRPC where possible: nonsense is the caller's mistake, not ours.
        is_parsed_here = not handler.request_streaming and handler.request_deserializer is not None

        async def handle(request: Any, context: _Context) -> Any:
            async with _Call(self, method, context) as call:
                call.check_gate()
                if is_parsed_here:
                    request = _parse(handler.request_deserializer, request)
                result = behavior(request, context)
                if not hasattr(result, "__aiter__"):
                    return await result
                async with aclosing(cast("Any", result)) as responses:
                    await _write_all(responses, context)
                return None

        make = getattr(grpc, f"{arity}_rpc_method_handler")
        deserializer = None if is_parsed_here else handler.request_deserializer
        return make(handle, deserializer, handler.response_serializer)

    def begin(self, method: str, context: _Context) -> Span | None:
        """Counts a call in and starts its span, as a child of the caller's."""
        self._metrics.rpc_inflight.labels(method).inc()
        metadata = _metadata(context)
        if request_id := metadata.get(REQUEST_ID_KEY, ""):
            bind_request_id(request_id[:128])
        if method.startswith(UNTRACED):
            return None
        span = self._telemetry.start_span(
            method,
            parent=self._telemetry.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
        )
        # This task serves one RPC only and ends with it: nothing to reset.
        self._telemetry.set_current(self._telemetry.context_of(span))
        return span

    def refusal(self, method: str, context: _Context) -> BatonError | None:
        """Why a call is refused before its handler runs, if it is."""
        if self._gate is None or (method.startswith(UNTRACED) and method != DRAIN):
            return None
        return self._gate(method, _metadata(context))

    def end(self, method: str, span: Span | None, status: str, duration_s: float) -> None:
        """Counts a call out and ends its span."""
        self._metrics.rpc_inflight.labels(method).dec()
        self._metrics.rpc_duration_s.labels(method, status).observe(duration_s)
        if span is None:
            return
        span.set_attribute("rpc.response.status_code", status)
        if status in _SERVER_ERRORS:
            span.set_attribute("error.type", status)
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def _metadata(context: _Context) -> dict[str, str]:
    pairs = cast("Iterable[tuple[str, Any]]", context.invocation_metadata() or ())
    return {key: value for key, value in pairs if isinstance(value, str)}


def _kind(is_streaming: bool) -> str:  # noqa: FBT001
    return "stream" if is_streaming else "unary"


def _parse(deserializer: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserializer(data)
    except DecodeError as error:
        raise InvalidRequest("the message cannot be parsed as this method's request") from error


async def _write_all(responses: AsyncIterator[Any], context: _Context) -> None:
    async for response in responses:
        await context.write(response)


class _Call:
    """One RPC, from its arrival to its status."""

    def __init__(self, owner: ServerInterceptor, method: str, context: _Context) -> None:
        self._owner = owner
        self._method = method
        self._context = context
        self._started_s = owner.clock.now()
        self._span: Span | None = None

    def check_gate(self) -> None:
        """Raises what refuses the call, if anything does."""
        refusal = self._owner.refusal(self._method, self._context)
        if refusal is not None:
            raise refusal

    async def __aenter__(self) -> _Call:
        self._span = self._owner.begin(self._method, self._context)
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _tb: object) -> None:
        # A write that met the call's end in core, a moment before the cancellation got here.
        if isinstance(error, grpc.aio.InternalError):
            error = asyncio.CancelledError()
        try:
            if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
                await self._abort(error)
            if isinstance(error, asyncio.CancelledError):
                raise error
        finally:
            duration_s = self._owner.clock.now() - self._started_s
            self._owner.end(self._method, self._span, self._status(error), duration_s)

    async def _abort(self, error: Exception) -> None:
        """Ends the RPC with the error's status. Raises gRPC's AbortError."""
        if isinstance(error, grpc.aio.AioRpcError):
            failure = error_from_rpc(error)
        elif isinstance(error, BatonError):
            failure = error
        else:
            failure = Internal("")
        if isinstance(failure, Internal):
            log_failure(logger, "rpc failed", error, rpc_method=self._method)
        if self._span is not None:
            self._span.set_attribute("baton.error.reason", failure.reason.name)
        await self._context.abort(
            CATALOGUE[failure.reason].code,
            public_message(failure),
            trailing_metadata(failure),
        )

    def _status(self, error: BaseException | None) -> str:
        if isinstance(error, asyncio.CancelledError):
            remaining_s = self._context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= 0.0
            return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
        code: Any = self._context.code()
        return (code if isinstance(code, grpc.StatusCode) else _CODES[code or 0]).name
