"""Hands the caller's trace on when the caller uses OpenTelemetry, which the SDK does not need."""

from __future__ import annotations

import sys
from importlib import import_module

from baton.wire.errors import Metadata


def trace_metadata() -> Metadata:
    """The current span's W3C context as gRPC metadata; empty without a current span."""
    if "opentelemetry.trace" not in sys.modules:
        return ()  # no span can have been started, and importing it would delay the first call
    # By name, because the SDK must neither need nor pull in OpenTelemetry.
    trace = import_module("opentelemetry.trace")
    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    w3c = import_module("opentelemetry.trace.propagation.tracecontext")
    carrier: dict[str, str] = {}
    w3c.TraceContextTextMapPropagator().inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
