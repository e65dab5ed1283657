"""Several streams of the SDK, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from baton.client import AsyncTextStream, Chunk

CAPACITY = 64


@dataclass(frozen=True, slots=True)
class ChoiceChunk:
    """A chunk of one of the streams."""

    index: int
    """The stream's, and so the choice's, number."""
    chunk: Chunk


def joined_per_choice(chunks: Sequence[ChoiceChunk]) -> list[ChoiceChunk]:
    """Joins the chunks of each choice into one."""
    joined: dict[int, Chunk] = {}
    for entry in chunks:
        before = joined.get(entry.index)
        joined[entry.index] = entry.chunk if before is None else _joined(before, entry.chunk)
    return [ChoiceChunk(index, chunk) for index, chunk in joined.items()]


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return replace(
        second,  # fields that only the last chunk carries
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


class MergedStreams:
    """Reads streams concurrently through a bounded queue; leaving the context cancels them all."""

    def __init__(self, streams: Sequence[AsyncTextStream]) -> None:
        self._streams = streams
        self._num_open = len(streams)
        self._error: BaseException | None = None
        self._queue: asyncio.Queue[ChoiceChunk | BaseException | None] = asyncio.Queue(CAPACITY)
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
        """At least one stream has not ended."""
        return self._num_open > 0

    async def read(self, timeout_s: float | None = None) -> list[ChoiceChunk]:
        """Waits for a chunk, and returns all available; empty on timeout and when all have ended.

        Raises:
            BatonError: a stream failed; all chunks before the failure have been returned.
        """
        chunks: list[ChoiceChunk] = []
        try:
            async with asyncio.timeout(timeout_s):
                while self.is_open and not chunks:
                    if self._error is not None:
                        raise self._error
                    self._take(await self._queue.get(), chunks)
        except TimeoutError:
            return []
        while self._error is None and not self._queue.empty():
            self._take(self._queue.get_nowait(), chunks)
        return chunks

    def _take(self, item: ChoiceChunk | BaseException | None, chunks: list[ChoiceChunk]) -> None:
        if isinstance(item, ChoiceChunk):
            chunks.append(item)
        elif item is None:
            self._num_open -= 1
        else:
            self._error = item

    async def _pump(self, index: int, stream: AsyncTextStream) -> None:
        """Puts the stream's chunks into the queue, then its error, or None at its end."""
        end: BaseException | None = None
        try:
            async with stream:
                async for chunk in stream:
                    await self._queue.put(ChoiceChunk(index, chunk))
        except Exception as error:  # noqa: BLE001 - the reader raises it again
            end = error
        await self._queue.put(end)
