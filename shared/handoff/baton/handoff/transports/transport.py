"""What a transport is: a way for the bytes of chunks, with an end at either worker.

The push's own stream carries all frames. Order, epochs, checksums, credits and the commit are
therefore the same for every transport: see docs/adr/0005-one-sided-transports.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from baton.core.handoff.frames import ChunkFrame, KvChunk, Offer, Opening


class Outlet(Protocol):
    """A transport's part in one push at the sender. Close it on every path."""

    def announce(self, opening: Opening) -> Opening:
        """The opening, with what the receiver needs to offer this transport."""
        ...

    def accept(self, offer: Offer) -> bool:
        """Takes the receiver's offer; False where it is for another transport.

        Raises:
            OSError: the offer is for this transport, and does not work here.
        """
        ...

    @property
    def max_chunk_bytes(self) -> int:
        """Most bytes that a chunk should have; known once an offer is accepted."""
        ...

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """Memory to put chunk `sequence` into. The sender must have credit for it."""
        ...

    def frame(self, chunk: KvChunk, payload: memoryview) -> ChunkFrame:
        """The frame of a chunk that lies in its room."""
        ...

    def close(self, *, is_committed: bool) -> None:
        """Lets go of what the push had."""
        ...


class Inlet(Protocol):
    """A transport's part in one push at the receiver. Close it on every path, once."""

    @property
    def offer(self) -> Offer | None:
        """What the receiver offers to the sender, if anything."""
        ...

    async def take(self, sequence: int, num_bytes: int) -> Callable[[], memoryview]:
        """Waits for a chunk that lies in a slot.

        Returns:
            A function that copies the chunk into memory that no sender reaches, and returns the
            copy, valid until the next chunk is taken. It runs on a writing thread.

        Raises:
            KvLayoutMismatch: the chunk has more bytes than a slot; the function may raise it too.
            KvTransferLost: the chunk cannot be had.
        """
        ...

    def close(self, *, is_committed: bool) -> None:
        """Ends the push's use of the transport. Only after a commit may memory be used again."""
        ...


class SenderEnd(Protocol):
    """A transport at a sending worker."""

    def outlet(self) -> Outlet:
        """The transport's part in a new push."""
        ...

    def close(self) -> None:
        """Lets go of idle memory."""
        ...


class ReceiverEnd(Protocol):
    """A transport at a receiving worker."""

    async def inlet(self, opening: Opening, num_slots: int) -> Inlet | None:
        """The transport's part in a new push, with at most `num_slots`; None without room.

        Raises:
            OSError: the transport does not work with this sender.
        """
        ...

    def close(self) -> None:
        """Lets go of idle memory and waits for the transport's threads."""
        ...


class Transport(Protocol):
    """Makes both ends. Each transport is a module with these two functions."""

    def sender(self) -> SenderEnd:
        """The end of a sending worker.

        Raises:
            OSError: the transport does not work on this machine.
        """
        ...

    def receiver(self, max_bytes: int) -> ReceiverEnd:
        """The end of a receiving worker, which may lend `max_bytes` of memory to senders.

        Raises:
            OSError: the transport does not work on this machine.
        """
        ...
