"""uvicorn's HTTP protocol, with the bounds that it lacks on heads and connections."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD_TIMEOUT_S = 20.0
"""Deadline for a request's head, from the connection or from the head's first byte; also for the
rest of a body whose response has been sent."""
MAX_HEAD_BYTES = 64 * 1024


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Closes it when a head is too large or too slow.

    A head is the request line and the headers; trailers count as well. uvicorn closes connections
    that idle between two requests, and request_body bounds bodies.
    """

    max_connections = 0
    """Set in a subclass; connections beyond it are refused."""
    _num_head_bytes = 0
    """Bytes received since the last complete head or piece of a body."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too many connections")
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timer."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses a piece of what the client sent."""
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "the head of the request is too large")
        elif self._head_timer is None and self._is_idle():
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body arrived; it does not extend the deadline."""
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request, with its body and trailers, is complete."""
        self._end_head()
        super().on_message_complete()

    def _start_head_timer(self) -> None:
        text = "the request did not arrive in time"
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408, text)

    def _end_head(self) -> None:
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _is_idle(self) -> bool:
        """No response is being sent, so what arrives belongs to the next request."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, text: str) -> None:
        if self._is_idle():  # else the status line would end up within a body
            rest = f"connection: close\r\ncontent-length: {len(text)}\r\n\r\n{text}"
            self.transport.write(STATUS_LINE[status] + rest.encode())
        self.transport.close()
