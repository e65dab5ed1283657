"""Spans from a run's trace files, joined into one tree per trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ENTRY_METHOD = "baton.v1.InferenceService/Generate"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One span as a process wrote it."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty at the root."""
    name: str
    service: str
    worker_id: str
    start_ns: int
    """Unix time."""
    end_ns: int
    attributes: dict[str, Any] = field(default_factory=dict)
    is_error: bool = False

    @property
    def duration_s(self) -> float:
        """From its start to its end."""
        return (self.end_ns - self.start_ns) / 1e9


def read_spans(directory: Path) -> Iterator[SpanRecord]:
    """All spans of a run; lines that are incomplete or foreign are left out."""
    for path in sorted([*directory.glob("*.jsonl.1"), *directory.glob("*.jsonl")]):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if (span := _parse(line)) is not None:
                    yield span


def find_trace(spans: Iterable[SpanRecord], wanted: str = "") -> list[SpanRecord]:
    """The spans of one trace, by start; empty if there is none.

    `wanted` is a trace id, the beginning of one (8 digits at least), or a request id; empty takes
    the latest request.
    """
    traces: dict[str, dict[str, SpanRecord]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, {})[span.span_id] = span
    found = [
        sorted(trace.values(), key=_start_order)
        for trace in traces.values()
        if _is_wanted(trace.values(), wanted)
    ]
    return max(found, key=lambda trace: trace[0].start_ns, default=[])


def as_tree(spans: list[SpanRecord]) -> Iterator[tuple[int, SpanRecord]]:
    """Spans with their depths, parents first, children by start.

    A span whose parent was not recorded is a root.
    """
    ids = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = {}
    for span in sorted(spans, key=_start_order):
        has_parent = span.parent_id in ids and span.parent_id != span.span_id
        children.setdefault(span.parent_id if has_parent else "", []).append(span)
    waiting = [(0, span) for span in reversed(children.get("", []))]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        below = children.pop(span.span_id, [])
        waiting += [(depth + 1, child) for child in reversed(below)]


def _start_order(span: SpanRecord) -> tuple[int, int]:
    return span.start_ns, -span.end_ns


def _is_wanted(spans: Iterable[SpanRecord], wanted: str) -> bool:
    if not wanted:
        return any(_ENTRY_METHOD in span.name for span in spans)
    return any(
        span.trace_id == wanted
        or (len(wanted) >= 8 and span.trace_id.startswith(wanted))
        or wanted in (value for key, value in span.attributes.items() if "request" in key)
        for span in spans
    )


def _parse(line: str) -> SpanRecord | None:
    try:
        record = json.loads(line)
        return SpanRecord(
            trace_id=record["trace_id"],
            span_id=record["span_id"],
            parent_id=record.get("parent_id") or "",
            name=record["name"],
            service=record["service"],
            worker_id=record["worker_id"],
            start_ns=int(record["start_unix_ns"]),
            end_ns=int(record["end_unix_ns"]),
            attributes=dict(record.get("attributes") or {}),
            is_error=record.get("status") == "ERROR",
        )
    except (ValueError, KeyError, TypeError):
        return None
