"""One server stream of a peer: read with a bound on silence, always cancelled when left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc

from baton.core.errors import BatonError, NoWorker, Stalled
from baton.wire.errors import error_from_rpc

ValueT = TypeVar("ValueT")


class Silent(Stalled):
    """The peer itself said nothing, as against one that reports somebody else's silence."""


class PeerStream(Generic[ValueT]):
    """A started call whose messages are read one by one. Owned by whoever made it."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall,  # type: ignore[type-arg]
        convert: Callable[[object], ValueT],
        peer: str,
    ) -> None:
        self._call = call
        self._convert = convert
        self._peer = peer

    async def next(self, timeout_s: float) -> ValueT | None:
        """The next message, None at the stream's end. One reader at a time.

        Raises:
            Silent: nothing came within the time; the call is cancelled.
            BatonError: the call failed.
        """
        try:
            async with asyncio.timeout(timeout_s):
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
        """Reads to the end, so that the peer sees an orderly one; gives up quietly."""
        try:
            while await self.next(timeout_s) is not None:
                pass
        except BatonError:
            self.cancel()

    def cancel(self) -> None:
        """Ends the call, whatever its state. Idempotent."""
        self._call.cancel()
