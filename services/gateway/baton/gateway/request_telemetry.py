"""The id, the span and the metrics of every HTTP request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from random import Random
from typing import Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.core.errors import InvalidRequest
from baton.core.ids import check_request_id, make_id
from baton.gateway.endpoints import Endpoint
from baton.rpc.logs import bind_request_id
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry

REQUEST_ID_HEADER = "x-request-id"
MAX_HEADER_ID_CHARS = 96
"""Leaves room for the suffixes of a request's generations."""
_CLIENT_GONE = 499


class RequestTelemetry:
    """ASGI middleware; puts `generation_id`, `started_s` and `span` into the request's state.

    Requests with a body get a span. Metrics name the paths of `endpoints`; others are "other".
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoints: Iterable[Endpoint],
        telemetry: Telemetry,
        metrics: Metrics,
        rng: Random,
    ) -> None:
        self._app = app
        self._endpoints = {endpoint.path: endpoint for endpoint in endpoints}
        self._telemetry = telemetry
        self._rng = rng
        self._duration_s = metrics.histogram(
            "http_server_request_duration_seconds",
            "Time from a request's arrival to its answer's last byte",
            ("route", "status"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        given = _given_id(Headers(scope=scope))
        request_id = given or make_id("req", self._rng)
        status, is_complete = 0, False
        started_s = time.monotonic()
        bind_request_id(request_id)
        endpoint = self._endpoints.get(scope["path"])
        span = self._start_span(scope, request_id) if endpoint and endpoint.body else None
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(
            # A client may reuse an id while its first request still runs; ours must be unique.
            generation_id=make_id(given, self._rng) if given else request_id,
            started_s=started_s,
            span=span,
        )

        async def observed_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append(REQUEST_ID_HEADER, request_id)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_complete = True

        try:
            await self._app(scope, receive, observed_send)
        except asyncio.CancelledError:
            is_complete = False
            raise
        finally:
            status = status if is_complete else _CLIENT_GONE
            route = "other" if endpoint is None else endpoint.path
            self._duration_s.labels(route, str(status)).observe(time.monotonic() - started_s)
            if span is not None:
                _end_span(span, status)

    def _start_span(self, scope: Scope, request_id: str) -> Span:
        headers = Headers(scope=scope)
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        span = self._telemetry.start_span(
            f"{scope['method']} {scope['path']}",
            parent=self._telemetry.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "http.route": scope["path"],
                "baton.request.id": request_id,
            },
        )
        # The server runs each request in a task, which ends with it: nothing to reset.
        self._telemetry.set_current(self._telemetry.context_of(span))
        return span


def _given_id(headers: Headers) -> str:
    """The client's id for the request; empty when it sent none or an invalid one."""
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
