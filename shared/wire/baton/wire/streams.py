"""A call's stream of answers, read one by one with a bound on silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from baton.core.clock import Clock
from baton.core.errors import BatonError, NoWorker, Stalled
from baton.wire.errors import error_from_rpc

ValueT = TypeVar("ValueT")
ValueT_co = TypeVar("ValueT_co", covariant=True)


class Silent(Stalled):
    """The peer itself sent nothing; a plain Stalled is its report about another process."""


class AnswerStream(Protocol[ValueT_co]):
    """A started call. The caller must cancel it when it stops reading."""

    async def next(self, timeout_s: float) -> ValueT_co | None:
        """The next value, None at the stream's end. One reader at a time.

        Raises:
            Silent: nothing came within the time; the call is cancelled.
            BatonError: the call failed.
        """

    async def drain(self, timeout_s: float) -> None:
        """Reads to the end, so that the peer sees an orderly one; gives up quietly."""

    def cancel(self) -> None:
        """Ends the call, in any state. Idempotent."""


class RpcStream(Generic[ValueT]):
    """An AnswerStream over gRPC. `peer` names the server in messages."""

    def __init__(
        self, call: Any, convert: Callable[[Any], ValueT], peer: str, clock: Clock
    ) -> None:
        self._call = call
        self._convert = convert
        self._peer = peer
        self._clock = clock

    async def next(self, timeout_s: float) -> ValueT | None:
        """See AnswerStream."""
        try:
            async with self._clock.timeout(timeout_s):
                message = await self._call.read()
        except TimeoutError as error:
            self.cancel()
            raise Silent(f"{self._peer} sent nothing for {timeout_s:.1f} s") from error
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The call was cancelled under us (its channel was closed), not our task.
            raise NoWorker(f"the connection to {self._peer} was closed") from error
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            return None
        return self._convert(message)

    async def drain(self, timeout_s: float) -> None:
        """See AnswerStream."""
        try:
            while await self.next(timeout_s) is not None:
                pass
        except BatonError:
            self.cancel()

    def cancel(self) -> None:
        """See AnswerStream."""
        self._call.cancel()
