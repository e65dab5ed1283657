# Generated from `async_stream.py`: edit that, then `make sync`.
"""A streamed answer on blocking gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Self

from baton.client.collect import Collector
from baton.client.connection import Connection
from baton.client.pause import Pause
from baton.client.retry import Retrier
from baton.client.types import Completion
from baton.core.errors import BatonError, Cancelled
from baton.wire.inference.blocking import ChunkCall, OpenCall
from baton.wire.inference.chunks import Chunk
from baton.wire.inference.requests import GenerateRequest


class TextStream(Iterator[Chunk]):
    """A streamed answer. The call starts with the first chunk asked for.

    Use it in `with`, which cancels the call when left: breaking out of `for` alone
    leaves the call running until the garbage collector finds it.
    """

    def __init__(
        self,
        request: GenerateRequest,
        prepare: Callable[[GenerateRequest], OpenCall],
        connection: Connection,
        retrier: Retrier,
        timeout_s: float,
    ) -> None:
        self._request = request
        self._prepare = prepare
        self._open_call = prepare(request)  # so that a mistake shows at once
        self._connection = connection
        self._retrier = retrier
        self._timeout_s = timeout_s
        self._pause = Pause()
        self._call: ChunkCall | None = None
        self._collector: Collector | None = None
        self._chunks = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """What came so far as one value; whole once the stream has ended."""
        now = time.monotonic()
        return (self._collector or self._collect_from(now)).completion(now)

    def close(self) -> None:
        """Cancels the call unless it has ended. For the thread that iterates."""
        self._chunks.close()

    def cancel(self) -> None:
        """Cancels from any thread: the iterating one gets `Cancelled`."""
        self._pause.end()
        if self._call is not None:
            self._call.cancel()

    def _collect_from(self, now: float) -> Collector:
        return Collector(self._request, now, can_resume=self._retrier.may_retry)

    def _run(self) -> Generator[Chunk, None]:
        started_at_s = time.monotonic()
        ends_at_s = started_at_s + self._timeout_s
        collector = self._collector = self._collect_from(started_at_s)
        delay_s: float | None = 0.0
        while delay_s is not None:
            if self._pause.ended_within(delay_s):
                raise Cancelled("the stream was cancelled")
            collector.num_attempts += 1
            terms = self._connection.terms(ends_at_s - time.monotonic())
            call = self._call = self._open_call(terms)
            if self._pause.has_ended:
                call.cancel()  # `cancel` came before `_call` was set
            has_chunks = False
            try:
                for chunk in call:
                    if not has_chunks:
                        has_chunks = True
                        self._retrier.succeeded()
                    yield collector.add(chunk, time.monotonic())
                collector.end(time.monotonic())
                return
            except BatonError as error:
                collector.broke_off(call.token_ids)
                delay_s = collector.delay_s(error, self._retrier, ends_at_s)
                self._open_call = self._prepare(collector.next_request())
            finally:
                call.cancel()
