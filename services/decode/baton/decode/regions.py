"""Where chunks lie that do not come with their frames: one region per push.

Whatever the region, this worker copies a chunk into memory of its own, on the word of a frame, and
checks and uses that copy. A region whose push was not committed is never used again, so whoever is
late meets nobody; the others wait for their sender's next push, since new memory costs time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from baton.core.handoff.frames import SLOTS_START_BYTES, Opening, SlotOffer
from baton.decode.pulls import PullRegion, Pulls
from baton.rpc.shared_memory import IS_SUPPORTED, ReceiverSlots

logger = logging.getLogger(__name__)
_MAX_SLOTS = 4
_SLOT_BYTES = 8 << 20
_MAX_IDLE = 4


class SharedRegion:
    """Slots in memory that the sender, on the same machine, writes to."""

    def __init__(self, regions: Regions, sender: str, slots: ReceiverSlots) -> None:
        self._regions = regions
        self._sender = sender
        self._slots = slots
        self.is_settled = False
        """All of the push was taken and committed: its sender touches nothing any more."""

    @property
    def offer(self) -> SlotOffer:
        """What the sender is told."""
        return self._slots.offer

    async def take(self, sequence: int, num_bytes: int) -> memoryview:
        """This worker's own copy of a chunk: see ReceiverSlots.take."""
        return self._slots.take(sequence, num_bytes)

    def close(self) -> None:
        """Nothing is taken any more."""
        if self.is_settled:
            self._regions.keep(self._sender, self._slots)
        else:
            self._regions.drop(self._slots)


Region = SharedRegion | PullRegion
"""One push's region. `close` it on every path, once."""


class Regions:
    """All regions of this worker."""

    def __init__(self, names: Sequence[str], max_bytes: int) -> None:
        """`names` are the transports allowed. Takes half a second where "nixl" is among them."""
        self._shares = "shm" in names and IS_SUPPORTED
        self._pulls: Pulls | None = None
        self._num_free_bytes = max_bytes
        self._idle: deque[tuple[str, ReceiverSlots]] = deque()
        """With the sender that they are for, the longest idle first."""
        if "nixl" in names:
            try:
                self._pulls = Pulls()
            except OSError as error:
                logger.warning("transport left out", extra={"error": str(error)})

    async def open(self, opening: Opening, num_slots: int) -> Region | None:
        """A region for a push; None when its bytes have to come by the stream."""
        for name in dict.fromkeys(opening.transports):
            region: Region | None = None
            try:
                if name == "nixl" and self._pulls is not None and opening.staged is not None:
                    region = await self._pulls.open(opening.staged)
                elif name == "shm" and self._shares:
                    region = self._share(opening.worker_id, num_slots)
            except OSError as error:
                logger.warning(
                    "transport failed; falling back",
                    extra={"transport": name, "from": opening.worker_id, "error": str(error)},
                )
            if region is not None:
                return region
        return None

    def keep(self, sender: str, slots: ReceiverSlots) -> None:
        """Has slots wait for another push of the sender."""
        self._idle.append((sender, slots))
        if len(self._idle) > _MAX_IDLE:
            self.drop(self._idle.popleft()[1])

    def drop(self, slots: ReceiverSlots) -> None:
        """Ends slots."""
        slots.close()
        self._num_free_bytes += slots.offer.num_bytes

    def stop(self) -> None:
        """Lets go of idle memory, and waits for the transports' threads."""
        while self._idle:
            self.drop(self._idle.pop()[1])
        if self._pulls is not None:
            self._pulls.thread.shutdown()

    def _share(self, sender: str, num_credits: int) -> SharedRegion | None:
        for place, (owner, slots) in enumerate(self._idle):
            if owner == sender:
                del self._idle[place]
                return SharedRegion(self, sender, slots)
        num_slots = min(num_credits, _MAX_SLOTS)
        needed_bytes = SLOTS_START_BYTES + num_slots * _SLOT_BYTES
        while needed_bytes > self._num_free_bytes and self._idle:
            self.drop(self._idle.popleft()[1])
        if needed_bytes > self._num_free_bytes:
            logger.info("no room for a region", extra={"free_bytes": self._num_free_bytes})
            return None
        slots = ReceiverSlots(num_slots, _SLOT_BYTES)
        self._num_free_bytes -= slots.offer.num_bytes
        return SharedRegion(self, sender, slots)
