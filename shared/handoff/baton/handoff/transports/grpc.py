"""The transport that always works: chunks come in their frames, over the push's gRPC stream."""

from __future__ import annotations

from collections.abc import Callable

from baton.core.errors import KvTransferLost
from baton.core.handoff.frames import ChunkFrame, KvChunk, Offer, Opening

_MAX_FRAME_BYTES = 1 << 20
"""Larger messages are slower over gRPC, and hold up what shares their connection."""


class StreamOutlet:
    """Chunks in frames, at the sender."""

    max_chunk_bytes = _MAX_FRAME_BYTES

    def __init__(self) -> None:
        self._buffer = bytearray()
        """Of the chunk being sent; its frame is a copy."""

    def announce(self, opening: Opening) -> Opening:
        """See Outlet: a receiver always takes chunks in frames."""
        return opening

    def accept(self, offer: Offer) -> bool:  # noqa: ARG002
        """See Outlet: no offer is for this transport."""
        return False

    def room(self, sequence: int, num_bytes: int) -> memoryview:  # noqa: ARG002
        """See Outlet."""
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return memoryview(self._buffer)[:num_bytes]

    def frame(self, chunk: KvChunk, payload: memoryview) -> ChunkFrame:
        """See Outlet."""
        return ChunkFrame(chunk, payload)

    def close(self, *, is_committed: bool) -> None:
        """See Outlet: there is nothing to let go of."""


class StreamInlet:
    """Chunks in frames, at the receiver."""

    offer = None

    async def take(self, sequence: int, num_bytes: int) -> Callable[[], memoryview]:  # noqa: ARG002
        """See Inlet."""
        raise KvTransferLost("a chunk came in a slot, and none were offered")

    def close(self, *, is_committed: bool) -> None:
        """See Inlet: there is nothing to let go of."""


class StreamSender:
    """The stream at a sending worker."""

    def outlet(self) -> StreamOutlet:
        """See SenderEnd."""
        return StreamOutlet()

    def close(self) -> None:
        """See SenderEnd: there is nothing to let go of."""


class StreamReceiver:
    """The stream at a receiving worker."""

    def __init__(self, max_bytes: int) -> None:
        """Lends no memory."""

    async def inlet(self, opening: Opening, num_slots: int) -> StreamInlet:  # noqa: ARG002
        """See ReceiverEnd."""
        return StreamInlet()

    def close(self) -> None:
        """See ReceiverEnd: there is nothing to let go of."""


sender = StreamSender
receiver = StreamReceiver
