"""The endpoints of the console: its page for everyone, its data for holders of a key."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.client import BatonError, QueueFull
from baton.core.ids import check_request_id
from baton.gateway.console.feed import ConsoleFeed
from baton.gateway.console.pages import ConsolePages
from baton.gateway.endpoints import Access, Endpoint
from baton.gateway.failures import error_body, json_response
from baton.gateway.generation import until_disconnected
from baton.gateway.schedulers import Schedulers

MAX_VIEWERS = 16
"""Open pages of one tenant; each asks the schedulers once a second."""
INTERVAL_S = 1.0
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


class Console:
    """The handlers of the console. The page is open; its data needs a key.

    Its calls do not count in a tenant's rate: an open page would use up what requests need.
    """

    def __init__(self, schedulers: Schedulers, is_draining: Callable[[], bool]) -> None:
        self._feed = ConsoleFeed(schedulers)
        self._pages = ConsolePages()
        self._is_draining = is_draining
        self._num_viewers: Counter[str] = Counter()

    def endpoints(self) -> list[Endpoint]:
        """All paths of the console."""
        return [
            Endpoint("GET", "/console", self.page, Access.OPEN),
            Endpoint("GET", "/console/api/live", self.live, Access.KEY),
            Endpoint("GET", "/console/api/requests/{request_id:path}", self.request, Access.KEY),
            Endpoint("GET", "/console/{name}", self.page, Access.OPEN),
        ]

    async def page(self, request: Request) -> Response:
        """Serves the page and its parts."""
        return self._pages.get(request)

    async def live(self, request: Request) -> ASGIApp:
        """Streams the state once a second, as server-sent events."""
        if self._num_viewers[request.state.tenant] >= MAX_VIEWERS:
            raise QueueFull(f"{MAX_VIEWERS} consoles are open", retry_after_s=5.0)
        return partial(self._stream, request.state.tenant)

    async def request(self, request: Request) -> ASGIApp:
        """Returns the timeline of one request."""
        request_id = check_request_id(request.path_params["request_id"])
        return json_response(await self._feed.request(request_id, request.state.tenant))

    async def _stream(self, tenant: str, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        self._num_viewers[tenant] += 1
        try:
            await until_disconnected(receive, self._write(tenant, send))
        finally:
            self._num_viewers[tenant] -= 1

    async def _write(self, tenant: str, send: Send) -> None:
        headers = list(_STREAM_HEADERS)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not self._is_draining():
            try:
                kind, body = b"state", await self._feed.now(tenant)
            except BatonError as error:
                kind, body = b"problem", error_body(error)
            data = b"event: " + kind + b"\ndata: " + orjson.dumps(body) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.sleep(INTERVAL_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
