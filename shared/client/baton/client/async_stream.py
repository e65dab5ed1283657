"""A streamed answer on grpc.aio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Any, Self

import grpc.aio

from baton.client.collect import Collector
from baton.client.connection import Connection
from baton.client.errors import error_of_call
from baton.client.retry import Retrier
from baton.client.types import Chunk, Completion
from baton.core.errors import Cancelled
from baton.v1 import inference_pb2


class AsyncTextStream(AsyncIterator[Chunk]):
    """A streamed answer. The call starts with the first chunk asked for.

    Use it in `async with`, which cancels the call when left: breaking out of `async for` alone
    leaves the call running until the garbage collector finds it. `await` on it is allowed and
    returns it unchanged.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        open_call: Callable[[Any, float], Any],
        connection: Connection,
        retrier: Retrier,
        timeout_s: float,
    ) -> None:
        self._request = request
        self._open_call = open_call
        self._connection = connection
        self._retrier = retrier
        self._timeout_s = timeout_s
        self._is_cancelled = False
        self._call: Any = None
        self._collector: Collector | None = None
        self._chunks = self._run()

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def completion(self) -> Completion:
        """What came so far as one value; whole once the stream has ended."""
        now = time.monotonic()
        return (self._collector or Collector(self._request, now)).completion(now)

    async def aclose(self) -> None:
        """Cancels the call unless it has ended. For the task that iterates."""
        await self._chunks.aclose()

    def cancel(self) -> None:
        """Cancels from another task of the loop: the iterating one gets `Cancelled`."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> AsyncGenerator[Chunk, None]:
        started_at_s = time.monotonic()
        ends_at_s = started_at_s + self._timeout_s
        collector = self._collector = Collector(self._request, started_at_s)
        request = collector.first_request(can_resume=self._retrier.may_retry)
        delay_s: float | None = 0.0
        while delay_s is not None:
            if delay_s:
                await asyncio.sleep(delay_s)
            if self._is_cancelled:
                raise Cancelled("the stream was cancelled")
            collector.num_attempts += 1
            call = self._call = self._open_call(request, max(0.0, ends_at_s - time.monotonic()))
            has_messages = False
            try:
                async for message in call:
                    if not has_messages:
                        has_messages = True
                        self._retrier.succeeded()
                    yield collector.add(message, time.monotonic())
                collector.end(time.monotonic())
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = error_of_call(rpc_error, self._connection.address)
                delay_s = collector.delay_s(error, self._retrier, ends_at_s)
                request = collector.next_request()
            except asyncio.CancelledError as cancelled:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # Not this task but the call was cancelled: by `cancel`, or by the client's close.
                raise Cancelled("the stream was cancelled") from cancelled
            finally:
                call.cancel()
