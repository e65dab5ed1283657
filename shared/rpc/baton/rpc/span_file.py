"""Spans as JSON lines in a file: what `baton trace` reads when there is no collector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

MAX_FILE_BYTES = 64 * 1024 * 1024


class JsonLinesExporter(SpanExporter):
    """Appends one line per span; a file of 64 MiB is renamed to `*.1` in the older one's place.

    Called from one exporter thread at a time.
    """

    def __init__(self, path: Path, *, service: str, worker_id: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._names = {"service": service, "worker_id": worker_id}

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes the spans; a full or missing disk costs the spans, not the process."""
        lines = "".join(f"{json.dumps(self._record(span), default=str)}\n" for span in spans)
        try:
            if self._path.exists() and self._path.stat().st_size > MAX_FILE_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _record(self, span: ReadableSpan) -> dict[str, object]:
        context = span.get_span_context()
        is_error = span.status.status_code is StatusCode.ERROR
        return {
            "trace_id": format_trace_id(context.trace_id) if context else "",
            "span_id": format_span_id(context.span_id) if context else "",
            "parent_id": format_span_id(span.parent.span_id) if span.parent else None,
            "name": span.name,
            "kind": span.kind.name,
            **self._names,
            "start_unix_ns": span.start_time,
            "end_unix_ns": span.end_time,
            "attributes": dict(span.attributes or {}),
            "status": "ERROR" if is_error else "OK",
        }
