"""Logs as JSON lines on stderr, with the request's and the trace's id where they are known.

Message = what happened, `extra` = the facts. Prompts and outputs are never logged: an exception
that a request raised is logged by its type and frames, without its text (see `log_failure`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from opentelemetry import trace

_REQUEST_ID: ContextVar[str] = ContextVar("baton_request_id", default="")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def bind_request_id(request_id: str) -> None:
    """Puts the id on all further log lines of this asyncio task and of tasks that it makes."""
    _REQUEST_ID.set(request_id)


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON; a record's `extra` becomes fields."""

    def __init__(self, role: str, worker_id: str) -> None:
        super().__init__()
        self._names = {"role": role, "worker_id": worker_id}

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            **self._names,
        }
        if request_id := _REQUEST_ID.get():
            fields["request_id"] = request_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields["trace_id"] = trace.format_trace_id(span.trace_id)
            fields["span_id"] = trace.format_span_id(span.span_id)
        extra = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        fields.update(extra)
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _GrpcNoise(logging.Filter):
    """Drops what grpc.aio logs when it cancels handlers at its stop; see grpc#43360."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, asyncio.CancelledError | BlockingIOError)


def setup_logging(level: str, role: str, worker_id: str, stream: TextIO | None = None) -> None:
    """Sends all of this process's logs to `stream` (stderr) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(role, worker_id))
    handler.addFilter(_GrpcNoise())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    for name in ("nats", "opentelemetry", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def log_failure(logger: logging.Logger, event: str, error: BaseException, **fields: object) -> None:
    """Logs an unexpected error by type and frames, its causes too, without any of their texts."""
    frames: list[str] = []
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames.append(f"{type(cause).__module__}.{type(cause).__qualname__}")
        frames.extend(line.rstrip() for line in traceback.format_tb(cause.__traceback__))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    logger.error(
        event, extra={"error_type": type(error).__qualname__, "traceback": frames, **fields}
    )
