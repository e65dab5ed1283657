"""What happens around every HTTP request: its id, its span, its metrics."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.core.errors import InvalidRequest
from baton.core.ids import check_request_id, make_id
from baton.rpc.logs import bind_request_id
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry

REQUEST_ID_HEADER = "x-request-id"
MAX_HEADER_ID_CHARS = 96
"""Leaves room for what is appended when one request becomes several generations."""
_TRACED = frozenset({
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
})
_COUNTED = _TRACED | {"/v1/models", "/health", "/ready", "/version", "/metrics", "/openapi.json"}
_CLIENT_GONE = 499


class Edge:
    """ASGI middleware. Puts `generation_id`, `started_s` and `span` into the request's state."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, metrics: Metrics, rng: Random) -> None:
        self._app = app
        self._telemetry = telemetry
        self._rng = rng
        self._duration_s = metrics.histogram(
            "http_server_request_duration_seconds",
            "Time from a request's arrival to its answer's last byte",
            ("route", "status"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _given_id(Headers(scope=scope))
        request_id = given or make_id("req", self._rng)
        exchange = _Exchange(request_id, send)
        started_s = time.monotonic()
        bind_request_id(request_id)
        span = self._start_span(scope, request_id)
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(
            # A caller may send one id again while its first request runs; ours must be unique.
            generation_id=make_id(given, self._rng) if given else request_id,
            started_s=started_s,
            span=span,
        )
        try:
            await self._app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            exchange.is_cut = True
            raise
        finally:
            status = exchange.status if exchange.is_whole else _CLIENT_GONE
            route = scope["path"] if scope["path"] in _COUNTED else "other"
            self._duration_s.labels(route, str(status)).observe(time.monotonic() - started_s)
            if span is not None:
                _end_span(span, status)

    def _start_span(self, scope: Scope, request_id: str) -> Span | None:
        path = scope["path"]
        if path not in _TRACED:
            return None
        attributes = {
            "http.request.method": scope["method"],
            "http.route": path,
            "baton.request.id": request_id,
        }
        headers = Headers(scope=scope)
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        span = self._telemetry.start_span(
            f"{scope['method']} {path}",
            parent=self._telemetry.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        # The server gives each request a task of its own, which ends with it: nothing to reset.
        self._telemetry.set_current(self._telemetry.context_of(span))
        return span


class _Exchange:
    """What went out so far."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.status = 0
        self.is_cut = False
        self._send = send
        self._is_ended = False

    @property
    def is_whole(self) -> bool:
        """True when the answer went out to its end."""
        return self._is_ended and not self.is_cut

    async def send(self, message: Message) -> None:
        """Passes a message on, with the request's id among the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).append(REQUEST_ID_HEADER, self.request_id)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_ended = True


def _given_id(headers: Headers) -> str:
    """The caller's id for the request; empty when there is none, or no usable one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    try:
        return check_request_id(given) if len(given) <= MAX_HEADER_ID_CHARS else ""
    except InvalidRequest:
        return ""  # an id is a convenience: a bad one is replaced, not refused


def _end_span(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))
    span.end()
