"""Traces: spans with explicit parents, W3C context in and out, exported to a file and over OTLP.

The current context lives in OpenTelemetry's context variable. The server's interceptor sets it
once in each RPC's own task and never resets it, so no token has to survive a yield. Export happens
on the processors' threads, with bounded queues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton.rpc.span_file import JsonLinesExporter

Attributes = Mapping[str, Any]
_EXPORT_DELAY_MS = 250
_EXPORT_TIMEOUT_S = 2.0  # with its retries: a collector that is down must not delay an exit
_FLUSH_TIMEOUT_MS = 3000


class Telemetry:
    """One process's tracer and its exporters. Its methods may be called from any thread."""

    def __init__(
        self,
        role: str,
        worker_id: str,
        *,
        trace_dir: Path | None = None,
        otlp_endpoint: str = "",
        processors: tuple[SpanProcessor, ...] = (),
    ) -> None:
        resource = Resource.create({
            "service.name": f"baton-{role}",
            "service.instance.id": worker_id,
        })
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._propagator = TraceContextTextMapPropagator()
        if trace_dir is not None:
            exporter = JsonLinesExporter(
                trace_dir / f"{role}-{worker_id}.jsonl", service=role, worker_id=worker_id
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS)
            )
        if otlp_endpoint:
            self._provider.add_span_processor(_otlp_processor(otlp_endpoint))
        for processor in processors:
            self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("baton")

    def start_span(
        self,
        name: str,
        *,
        parent: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """A span that the caller must `end()`; the current context is its parent if none is named.

        `start_ns` is Unix time in nanoseconds.
        """
        return self.tracer.start_span(
            name, context=parent, kind=kind, attributes=attributes, start_time=start_ns
        )

    def record_span(
        self,
        name: str,
        start_s: float,
        end_s: float,
        parent: Context | None = None,
        attributes: Attributes | None = None,
    ) -> Span:
        """A span that is already over; times are on `time.monotonic()`'s clock."""
        span = self.start_span(
            name, parent=parent, attributes=attributes, start_ns=unix_ns(start_s)
        )
        span.end(unix_ns(max(start_s, end_s)))
        return span

    def current_context(self) -> Context:
        """The context that new spans are made in."""
        return otel_context.get_current()

    def context_of(self, span: Span) -> Context:
        """A context whose parent is `span`."""
        return trace.set_span_in_context(span)

    def set_current(self, context: Context) -> None:
        """Makes `context` current for the rest of this asyncio task (and tasks that it makes)."""
        otel_context.attach(context)

    def inject(self, context: Context | None = None) -> dict[str, str]:
        """W3C headers of a context, the current one if none is named; empty without a trace."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return carrier

    def extract(self, carrier: Mapping[str, str]) -> Context:
        """The context that W3C headers (lower-case keys) name; without them, one with no parent."""
        return self._propagator.extract(dict(carrier), Context())

    def flush(self) -> None:
        """Exports what has ended so far. Blocks for up to a few seconds: not for the event loop."""
        self._provider.force_flush(_FLUSH_TIMEOUT_MS)

    def shutdown(self) -> None:
        """Exports what is left and closes the exporters. Blocks for up to a few seconds."""
        self._provider.shutdown()


def trace_id_hex(span: Span) -> str:
    """The span's trace id, 32 hex digits."""
    return trace.format_trace_id(span.get_span_context().trace_id)


def unix_ns(monotonic_s: float) -> int:
    """Unix time in nanoseconds of a reading of `time.monotonic()`."""
    return time.time_ns() - time.monotonic_ns() + round(monotonic_s * 1e9)


def _otlp_processor(endpoint: str) -> SpanProcessor:
    # Imported here because it is large, and most local runs have no collector.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    return BatchSpanProcessor(
        OTLPSpanExporter(
            endpoint=endpoint,
            insecure=not endpoint.startswith("https"),
            timeout=_EXPORT_TIMEOUT_S,
        )
    )
