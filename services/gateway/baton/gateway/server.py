"""uvicorn inside a process that owns signals, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from baton.gateway.http_protocol import BoundedHttpProtocol

KEEP_ALIVE_S = 30
STOP_S = 2.0
"""Time for cancelled requests to end."""
UNREAD_S = 60.0
"""The kernel, where it can (Linux), disconnects a client that reads nothing for this long."""


class _Server(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none: rpc.process owns them."""
        yield


class HttpServer:
    """Serves an ASGI application until it is drained or stopped."""

    def __init__(self, app: ASGIApp, host: str, port: int, max_connections: int = 4096) -> None:
        self._host = host
        self._port = port
        config = uvicorn.Config(
            app,
            loop="none",
            http=type("Protocol", (BoundedHttpProtocol,), {"max_connections": max_connections}),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Binds and accepts; returns the address, host:port. The kernel queues early connections.

        Raises:
            OSError: the address is taken or not this host's.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family, backlog=2048)
        # Every connection inherits it. asyncio sets it only on sockets with an explicit protocol,
        # and without it an answer waits 40 ms for the acknowledgement of its status line.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            unread_ms = round(UNREAD_S * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)
        port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listener]))
        return f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    async def drain(self, grace_s: float) -> None:
        """Stops accepting, and waits up to `grace_s` for running requests to end."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=grace_s)

    async def stop(self) -> None:
        """Cancels running requests."""
        if self._task is None:
            return
        self._server.should_exit = True
        self._server.force_exit = True
        running = list(self._server.server_state.tasks)
        for task in running:
            task.cancel()
        await asyncio.wait({self._task}, timeout=STOP_S)
        self._task.cancel()
        await asyncio.gather(self._task, *running, return_exceptions=True)
        self._task = None
