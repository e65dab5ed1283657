"""Paths of the console: its page for everybody, its data for those with a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.client import BatonError, QueueFull
from baton.core.ids import check_request_id
from baton.gateway.console.feed import Feed
from baton.gateway.console.pages import Pages
from baton.gateway.failures import error_body, json_response
from baton.gateway.generation import until_disconnected
from baton.gateway.schedulers import Schedulers

Handler = Callable[[Request], Awaitable[ASGIApp]]
MAX_VIEWERS = 16
"""Open pages; each asks the schedulers once a second."""
INTERVAL_S = 1.0
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(slots=True)
class Console:
    """Handlers, and how many pages are open."""

    feed: Feed
    is_draining: Callable[[], bool]
    num_viewers: int = 0

    async def live(self, request: Request) -> ASGIApp:
        """GET /console/api/live: the state now and then once a second, as server-sent events."""
        if self.num_viewers >= MAX_VIEWERS:
            raise QueueFull(f"{MAX_VIEWERS} consoles are open", retry_after_s=5.0)
        return partial(self._stream, request.state.tenant)

    async def request(self, request: Request) -> ASGIApp:
        """GET /console/api/requests/{id}: one request's time line."""
        request_id = check_request_id(request.path_params["request_id"])
        return json_response(await self.feed.request(request_id, request.state.tenant))

    async def _stream(self, tenant: str, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        self.num_viewers += 1
        try:
            await until_disconnected(receive, self._write(tenant, send))
        finally:
            self.num_viewers -= 1

    async def _write(self, tenant: str, send: Send) -> None:
        headers = list(_STREAM_HEADERS)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not self.is_draining():
            try:
                kind, body = b"state", await self.feed.now(tenant)
            except BatonError as error:
                kind, body = b"problem", error_body(error)
            data = b"event: " + kind + b"\ndata: " + orjson.dumps(body) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.sleep(INTERVAL_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def console_routes(
    schedulers: Schedulers, is_draining: Callable[[], bool], admitted: Callable[[Handler], Handler]
) -> list[Route]:
    """All paths of the console; `admitted` guards those with data."""
    pages = Pages()
    console = Console(Feed(schedulers), is_draining)

    async def page(request: Request) -> Response:
        return pages.get(request)

    return [
        Route("/console", page),
        Route("/console/api/live", admitted(console.live)),
        Route("/console/api/requests/{request_id:path}", admitted(console.request)),
        Route("/console/{name}", page),
    ]
