"""Hands the caller's trace on when the caller uses OpenTelemetry, which the SDK does not need."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

Metadata = tuple[tuple[str, str], ...]


def trace_metadata() -> Metadata:
    """The current span's W3C context as gRPC metadata; empty without a current span."""
    if find_spec("opentelemetry") is None:
        return ()
    # By name, because the SDK must neither need nor pull in OpenTelemetry.
    trace = import_module("opentelemetry.trace")
    w3c = import_module("opentelemetry.trace.propagation.tracecontext")
    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    w3c.TraceContextTextMapPropagator().inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
