"""A streamed answer on blocking gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import grpc

from baton.client.collect import Collector
from baton.client.connection import Connection
from baton.client.errors import error_of_call
from baton.client.retry import Retrier
from baton.client.types import Chunk, Completion
from baton.core.errors import Cancelled
from baton.v1 import inference_pb2


class TextStream(Iterator[Chunk]):
    """A streamed answer. The call starts with the first `next`; leaving `with` cancels it."""

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
        self._cancelled = threading.Event()
        self._call: Any = None
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
        return (self._collector or Collector(self._request, now)).completion(now)

    def close(self) -> None:
        """Cancels the call unless it has ended. For the thread that iterates."""
        self._chunks.close()

    def cancel(self) -> None:
        """Cancels from any thread: the iterating one gets `Cancelled`."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def _run(self) -> Generator[Chunk, None, None]:
        started_at_s = time.monotonic()
        ends_at_s = started_at_s + self._timeout_s
        collector = self._collector = Collector(self._request, started_at_s)
        request = collector.first_request(can_resume=self._retrier.may_retry)
        delay_s: float | None = 0.0
        while delay_s is not None:
            if self._cancelled.wait(delay_s):
                raise Cancelled("the stream was cancelled")
            collector.num_attempts += 1
            call = self._call = self._open_call(request, max(0.0, ends_at_s - time.monotonic()))
            if self._cancelled.is_set():
                call.cancel()  # by another thread just now, before it could see this call
            has_messages = False
            try:
                for message in call:
                    if not has_messages:
                        has_messages = True
                        self._retrier.succeeded()
                    yield collector.add(message, time.monotonic())
                collector.end(time.monotonic())
                return
            except grpc.RpcError as rpc_error:
                error = error_of_call(rpc_error, self._connection.address)
                delay_s = collector.delay_s(error, self._retrier, ends_at_s)
                request = collector.next_request()
            finally:
                call.cancel()
