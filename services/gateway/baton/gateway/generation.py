"""One generation over HTTP: calls the SDK, and writes JSON or server-sent events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

import orjson
from starlette.types import Message, Receive, Scope, Send

from baton.client import AsyncClient, AsyncTextStream, BatonError
from baton.core.errors import ErrorReason, error_for
from baton.gateway.answer_format import AnswerFormat, Json, usage_json
from baton.gateway.failures import error_body, json_response
from baton.gateway.generation_telemetry import GenerationTelemetry
from baton.gateway.merged_streams import ChoiceChunk, MergedStreams, joined_per_choice
from baton.gateway.sampling_body import ChoiceRequest
from baton.rpc.logs import log_failure

logger = logging.getLogger(__name__)
SLOW_WRITE_S = 0.02
"""A client whose socket blocks a write for longer gets fewer and larger chunks."""
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(slots=True)
class Generation:
    """The ASGI application that answers one request.

    It owns the SDK's calls from the first to the last byte, and cancels them when it is cancelled.
    Raises BatonError if a call fails before the answer begins.
    """

    client: AsyncClient
    request_id: str
    choices: Sequence[ChoiceRequest]
    format: AnswerFormat
    telemetry: GenerationTelemetry
    is_stream: bool
    outputs_per_prompt: int
    timeout_s: float
    ping_interval_s: float
    _opened: set[int] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the request."""
        streams = self._start_streams()
        async with MergedStreams(streams) as merged:
            try:
                if self.is_stream:
                    # An error before the first chunk still gets its own status line.
                    chunks = await merged.read()
                    await self._write_stream(streams, merged, chunks, send)
                    return
                while merged.is_open:
                    self._observe(await merged.read())
            finally:
                self.telemetry.ended([stream.completion for stream in streams])
        answers = [stream.completion for stream in streams]
        self.format.header.model = self.format.header.model or answers[0].model
        response = json_response(self.format.whole(answers, self._usage_json(streams)))
        await response(scope, receive, send)

    def _start_streams(self) -> list[AsyncTextStream]:
        """One call of the SDK per choice; further choices of a prompt fork from its first."""
        streams = []
        for index, choice in enumerate(self.choices):
            choice.options["timeout_s"] = self.timeout_s
            has_siblings = len(self.choices) > 1
            choice.options["request_id"] = self.request_id + (f"-{index}" if has_siblings else "")
            first = index - index % self.outputs_per_prompt
            if index != first:
                choice.options["fork_of"] = f"{self.request_id}-{first}"
            streams.append(self.client.generate(choice.prompt, stream=True, **choice.options))
        return streams

    async def _write_stream(
        self,
        streams: Sequence[AsyncTextStream],
        merged: MergedStreams,
        chunks: list[ChoiceChunk],
        send: Send,
    ) -> None:
        """Writes everything from the status line to `[DONE]`; errors become events."""
        start = {"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)}
        await send(start)
        try:
            while chunks or merged.is_open:
                started_s = time.monotonic()
                await send(_body(self._encode(chunks) if chunks else _PING))
                is_slow = time.monotonic() - started_s > SLOW_WRITE_S
                chunks = await merged.read(self.ping_interval_s)
                chunks = joined_per_choice(chunks) if is_slow else chunks
            tail = b""
            if self.format.header.has_usage:
                usage = self._usage_json(streams)
                tail = _event(self.format.header.chunk(self.format.chunk_kind, [], usage))
        except BatonError as error:
            tail = _event(error_body(error))
        except Exception as error:  # noqa: BLE001 - the status is out: report in the stream
            log_failure(logger, "stream failed", error)
            tail = _event(error_body(error_for(ErrorReason.INTERNAL, "")))
        await send(_body(tail + _DONE, is_last=True))

    def _encode(self, chunks: Sequence[ChoiceChunk]) -> bytes:
        self._observe(chunks)
        bodies: list[Json] = []
        for entry in chunks:
            if entry.index not in self._opened:
                self._opened.add(entry.index)
                bodies += self.format.opening(entry.index)
            bodies += self.format.pieces(entry.index, entry.chunk)
        return b"".join(map(_event, bodies))

    def _observe(self, chunks: Sequence[ChoiceChunk]) -> None:
        header = self.format.header
        for entry in chunks:
            header.model = header.model or entry.chunk.model
            if entry.chunk.text or entry.chunk.num_tokens:
                self.telemetry.has_token(header.model)

    def _usage_json(self, streams: Sequence[AsyncTextStream]) -> Json:
        return usage_json([stream.completion.usage for stream in streams], self.outputs_per_prompt)


async def until_disconnected(receive: Receive, work: Awaitable[None]) -> None:
    """Runs `work` until the client disconnects. The request's body must have been read."""
    worker = asyncio.ensure_future(work)
    listener = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, listener}, return_when=asyncio.FIRST_COMPLETED)
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
