"""What only threads can do to a blocking stream."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from baton.client import Cancelled, RetryPolicy
from baton.client.connection import Connection
from baton.client.retry import Retrier
from baton.client.sync_stream import TextStream
from baton.core.sampling import SamplingParams
from baton.wire.inference.chunks import Chunk
from baton.wire.inference.requests import GenerateRequest


class Call:
    """Ends when it is cancelled, as a call of gRPC's would; without that, well."""

    def __init__(self) -> None:
        self.was_cancelled = False
        self.token_ids: list[int] = []

    def cancel(self) -> None:
        self.was_cancelled = True

    def __iter__(self) -> Call:
        return self

    def __next__(self) -> Chunk:
        if self.was_cancelled:
            raise Cancelled("as gRPC would")
        pytest.fail("the call was not cancelled")


def test_cancelling_while_the_call_is_being_opened_cancels_it() -> None:
    def open_call(_terms: object) -> Any:
        stream.cancel()  # as from another thread
        return Call()

    connection = Connection("127.0.0.1:1", 5.0)
    retrier = Retrier(RetryPolicy(), Random(1))
    request = GenerateRequest("x", SamplingParams())
    stream = TextStream(request, lambda _request: open_call, connection, retrier, 5.0)
    with pytest.raises(Cancelled):
        next(stream)
