"""A push's call at the sender, and the transport that its two workers agreed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from baton.core.errors import BatonError, ErrorReason, KvTransferLost
from baton.core.handoff.frames import (
    Committed,
    Credit,
    KvChunk,
    Offer,
    Opening,
    PullOffer,
    PushFrame,
    SlotOffer,
)
from baton.handoff.transports.registry import SenderTransports
from baton.wire.push import PushCall

_SAYS_WHY = frozenset({
    ErrorReason.STALE_EPOCH,
    ErrorReason.KV_LAYOUT_MISMATCH,
    ErrorReason.KV_CHECKSUM,
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.STALLED,
    ErrorReason.DEADLINE,
})
"""Reasons that a receiver gives itself; all others mean that it is not reachable."""
_MAY_BE_TRANSPORT = frozenset({ErrorReason.KV_CHECKSUM, ErrorReason.KV_TRANSFER_LOST})
"""Failures of a push that another transport may not have."""


class PushStream:
    """One push to the worker at `address`. `cancel` it when leaving early."""

    def __init__(self, call: PushCall, address: str, transports: SenderTransports) -> None:
        self._call = call
        self._address = address
        self._transports = transports
        self._outlets = transports.outlets(address)
        *self._wanted, self.transport = self._outlets
        """Transports to ask for, and the name of the one in use: at first the stream itself."""
        self._stream = self._outlet = self._outlets[self.transport]
        self._is_committed = False

    @property
    def max_chunk_bytes(self) -> int:
        """Most bytes that a chunk should have; known once there is credit."""
        return self._outlet.max_chunk_bytes

    async def open(self, opening: Opening) -> None:
        """Sends the first frame, with the transports that the push can use."""
        for outlet in self._outlets.values():
            opening = outlet.announce(opening)
        await self.send(replace(opening, transports=tuple(self._wanted)))

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """Memory to put a chunk into before it is sent; there must be credit for it."""
        outlet = self._outlet if num_bytes <= self.max_chunk_bytes else self._stream
        return outlet.room(sequence, num_bytes)

    async def chunk(self, chunk: KvChunk, payload: memoryview) -> None:
        """Sends a chunk, which lies in its room."""
        outlet = self._outlet if payload.nbytes <= self.max_chunk_bytes else self._stream
        await self.send(outlet.frame(chunk, payload))

    async def send(self, frame: PushFrame) -> None:
        """Sends any frame.

        Raises:
            BatonError: see PushCall.write; so do all methods that send.
        """
        with self._errors():
            await self._call.write(frame)

    async def end(self) -> None:
        """Sends nothing more."""
        await self._call.end()

    async def read(self) -> Credit | Committed:
        """The receiver's next answer.

        Raises:
            BatonError: the receiver's reason, or KvTransferLost.
        """
        with self._errors():
            try:
                answer = await self._call.read()
                if isinstance(answer, SlotOffer | PullOffer):
                    self._take(answer)
                    answer = await self._call.read()
            except BatonError as error:
                if self._outlet is not self._stream and error.reason in _MAY_BE_TRANSPORT:
                    self._transports.failed(self._address, self.transport, "transfer", error)
                raise
        if isinstance(answer, SlotOffer | PullOffer):
            raise KvTransferLost(f"the decode worker at {self._address} offered twice")
        if isinstance(answer, Committed):
            self._is_committed = True
        else:
            self._settle(self.transport)
        return answer

    def cancel(self) -> None:
        """Ends the call at once; harmless when it is over."""
        self._call.cancel()
        outlets, self._outlets = self._outlets, {}
        for outlet in outlets.values():
            outlet.close(is_committed=self._is_committed)

    def _take(self, offer: Offer) -> None:
        for name, outlet in self._outlets.items():
            try:
                if not outlet.accept(offer):
                    continue
                self.transport, self._outlet = name, outlet
            except OSError as error:
                self._transports.failed(self._address, name, "open", error)
            self._settle(name)
            return

    def _settle(self, name: str) -> None:
        """Takes note of the transport that the receiver chose."""
        wanted, self._wanted = self._wanted, []
        if wanted and wanted[0] != name:
            self._transports.declined(wanted[0])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns a failure into what it means to the caller that asked for the push.

        That the receiver does not know the reservation does not make the request unknown here.
        """
        try:
            yield
        except BatonError as error:
            if error.reason in _SAYS_WHY:
                raise
            raise KvTransferLost(f"push to {self._address}: {error.message}") from error
