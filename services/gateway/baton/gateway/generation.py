"""One generation over HTTP: calls the SDK, writes JSON or server-sent events, ends with its client.

It is an ASGI application by itself, so that one scope owns the calls from the first byte asked for
to the last one written, and a client that goes away takes them along.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from baton.client import AsyncClient, AsyncTextStream, BatonError, Completion, Usage
from baton.core.errors import ErrorReason, error_for
from baton.gateway.failures import error_body, error_response, json_response
from baton.gateway.fan_in import Event, FanIn, merged
from baton.gateway.openai import Job
from baton.gateway.render import Head, Json, Renderer, usage_json
from baton.gateway.watch import Watch
from baton.rpc.logs import log_failure

logger = logging.getLogger(__name__)
SLOW_WRITE_S = 0.02
"""A socket that keeps a write waiting for so long gets fewer and larger chunks."""
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate, and how to show it."""

    request_id: str
    jobs: Sequence[Job]
    renderer: Renderer
    head: Head
    is_stream: bool
    outputs_per_prompt: int
    timeout_s: float
    ping_interval_s: float


class Generation:
    """Answers one request that `plan` describes."""

    def __init__(self, client: AsyncClient, plan: Plan, watch: Watch) -> None:
        self._client = client
        self._plan = plan
        self._head = plan.head
        self._watch = watch
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await until_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = None
        try:
            streams = self._streams()
            async with FanIn(streams) as fan_in:
                try:
                    if self._plan.is_stream:
                        events = await fan_in.read()
                        await self._write_stream(streams, fan_in, events, send)
                        return
                    while fan_in.is_open:
                        self._look_at(await fan_in.read())
                finally:
                    self._watch.ended([stream.completion for stream in streams])
            response = self._whole([stream.completion for stream in streams])
        except BatonError as error:
            response = error_response(error)
        await response(scope, receive, send)

    def _streams(self) -> list[AsyncTextStream]:
        request_id = self._plan.request_id
        num_jobs = len(self._plan.jobs)
        streams = []
        for index, job in enumerate(self._plan.jobs):
            job.options["timeout_s"] = self._plan.timeout_s
            job.options["request_id"] = request_id if num_jobs == 1 else f"{request_id}-{index}"
            first = index - index % self._plan.outputs_per_prompt
            if index != first:
                job.options["fork_of"] = f"{request_id}-{first}"
            streams.append(self._client.generate(job.prompt, stream=True, **job.options))
        return streams

    def _whole(self, answers: Sequence[Completion]) -> Response:
        head = replace(self._head, model=self._head.model or answers[0].model)
        usage = self._usage([answer.usage for answer in answers])
        return json_response(self._plan.renderer.whole(head, answers, usage))

    async def _write_stream(
        self,
        streams: Sequence[AsyncTextStream],
        fan_in: FanIn,
        events: list[Event],
        send: Send,
    ) -> None:
        """Writes everything from the status line to `[DONE]`; errors go into the stream."""
        start = {"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)}
        await send(start)
        try:
            while events or fan_in.is_open:
                started_s = time.monotonic()
                await send(_body(self._encode(events) if events else _PING))
                is_slow = time.monotonic() - started_s > SLOW_WRITE_S
                events = await fan_in.read(self._plan.ping_interval_s)
                events = merged(events) if is_slow else events
            tail = b""
            if self._head.has_usage:
                usage = self._usage([stream.completion.usage for stream in streams])
                tail = _event(self._plan.renderer.ending(self._head, usage))
        except BatonError as error:
            tail = _event(error_body(error))
        except Exception as error:  # noqa: BLE001 - the status line is out; only the stream can tell
            log_failure(logger, "stream failed", error)
            tail = _event(error_body(error_for(ErrorReason.INTERNAL, "")))
        await send(_body(tail + _DONE, is_last=True))

    def _encode(self, events: Sequence[Event]) -> bytes:
        self._look_at(events)
        renderer, parts = self._plan.renderer, []
        for event in events:
            if event.index not in self._opened:
                self._opened.add(event.index)
                parts += renderer.opening(self._head, event.index)
            parts += renderer.pieces(self._head, event.index, event.chunk)
        return b"".join(_event(part) for part in parts)

    def _look_at(self, events: Sequence[Event]) -> None:
        for event in events:
            if not self._head.model and event.chunk.model:
                self._head = replace(self._head, model=event.chunk.model)
            if event.chunk.text or event.chunk.num_tokens:
                self._watch.token(self._head.model)

    def _usage(self, usages: Sequence[Usage]) -> Json:
        return usage_json(usages, self._plan.outputs_per_prompt)


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it when the client goes away. The body must have been read."""
    worker = asyncio.create_task(work)
    listener = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            logger.debug("client went away")
    finally:
        worker.cancel()
        listener.cancel()
        await asyncio.gather(worker, listener, return_exceptions=True)
    if not worker.cancelled() and (error := worker.exception()) is not None:
        raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: Json) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _body(data: bytes, *, is_last: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not is_last}
