"""Several streamed answers read as one sequence of events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from baton.client import AsyncTextStream, BatonError, Chunk

CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of one of the answers."""

    index: int
    """Which answer."""
    chunk: Chunk


def merged(events: Sequence[Event]) -> list[Event]:
    """One event per answer that says what all of them say."""
    chunks: dict[int, Chunk] = {}
    for event in events:
        before, chunk = chunks.get(event.index), event.chunk
        chunks[event.index] = chunk if before is None else _joined(before, chunk)
    return [Event(index, chunk) for index, chunk in chunks.items()]


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return replace(
        second,  # what only the last message carries is there
        text=first.text + second.text,
        token_index=first.token_index,
        num_tokens=first.num_tokens + second.num_tokens,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        request_id=first.request_id or second.request_id,
        model=first.model or second.model,
        trace_id=second.trace_id or first.trace_id,
    )


@dataclass(frozen=True, slots=True)
class _End:
    """One of the answers ended, well or not."""

    error: BaseException | None = None


class FanIn:
    """Reads streams side by side through a bounded queue; leaving it cancels all of them."""

    def __init__(self, streams: Sequence[AsyncTextStream]) -> None:
        self._streams = streams
        self._num_open = len(streams)
        self._error: BaseException | None = None
        self._queue: asyncio.Queue[Event | _End] = asyncio.Queue(CAPACITY)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._pump(index, stream))
            for index, stream in enumerate(self._streams)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_open(self) -> bool:
        """False when all answers have ended."""
        return self._num_open > 0

    async def read(self, timeout_s: float | None = None) -> list[Event]:
        """All events that are there, waiting for the first; empty after the timeout or at the end.

        Raises:
            BatonError: one of the answers failed, and all events before that have been read.
        """
        events: list[Event] = []
        try:
            async with asyncio.timeout(timeout_s):
                while self.is_open and not events:
                    if self._error is not None:
                        raise self._error
                    self._take(await self._queue.get(), events)
        except TimeoutError:
            return []
        while self._error is None and not self._queue.empty():
            self._take(self._queue.get_nowait(), events)
        return events

    def _take(self, item: Event | _End, events: list[Event]) -> None:
        if isinstance(item, Event):
            events.append(item)
        elif item.error is None:
            self._num_open -= 1
        else:
            self._error = item.error

    async def _pump(self, index: int, stream: AsyncTextStream) -> None:
        end = _End()
        try:
            async with stream:
                async for chunk in stream:
                    await self._queue.put(Event(index, chunk))
        except BatonError as error:
            end = _End(error)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            end = _End(error)
        await self._queue.put(end)
