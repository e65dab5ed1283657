"""Where chunks lie that do not come with their frames: one region per push.

Whatever the region, this worker copies a chunk into memory of its own, on the word of a frame, and
checks and uses that copy. No region serves two pushes, so whoever is late meets nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from baton.core.errors import KvLayoutMismatch
from baton.core.handoff import Opening
from baton.decode.pulls import PullOffer, Pulls
from baton.rpc.shared_memory import HEADER_BYTES, IS_SUPPORTED, ReceiverSlots, SlotOffer

logger = logging.getLogger(__name__)
_MAX_SLOT_BYTES = 4 << 20
_PAGE_BYTES = 4096


class Region(Protocol):
    """One push's region. `close` it on every path, once."""

    @property
    def offer(self) -> SlotOffer | PullOffer:
        """What the sender is told of it."""

    async def take(self, sequence: int, num_bytes: int) -> memoryview:
        """This worker's own copy of a chunk; valid until the next one is taken.

        Raises:
            KvLayoutMismatch: it does not fit into a slot.
            KvTransferLost: it could not be had.
        """

    def close(self) -> None:
        """Nothing is taken any more."""


class SharedRegion:
    """Slots in memory that the sender, on the same machine, writes to."""

    def __init__(self, regions: Regions, slots: ReceiverSlots) -> None:
        self._regions = regions
        self._slots = slots

    @property
    def offer(self) -> SlotOffer:
        """See Region."""
        return self._slots.offer

    async def take(self, sequence: int, num_bytes: int) -> memoryview:
        """See Region."""
        try:
            return self._slots.take(sequence, num_bytes)
        except ValueError as error:
            raise KvLayoutMismatch(str(error)) from error

    def close(self) -> None:
        """See Region."""
        self._slots.close()
        self._regions.num_free_bytes += self._slots.offer.num_bytes


class Regions:
    """All regions of this worker."""

    def __init__(self, names: Sequence[str], max_bytes: int) -> None:
        """`names` are the transports allowed. Takes half a second where "nixl" is among them."""
        self._shares = "shm" in names and IS_SUPPORTED
        self._pulls: Pulls | None = None
        self.num_free_bytes = max_bytes
        """Of the memory that may be shared."""
        if "nixl" in names:
            try:
                self._pulls = Pulls()
            except OSError as error:
                logger.warning("transport left out", extra={"error": str(error)})

    async def open(self, opening: Opening, num_slots: int, num_bytes: int) -> Region | None:
        """A region for a push of `num_bytes`; None when its bytes have to come by the stream."""
        if not num_bytes:
            return None
        for name in dict.fromkeys(opening.transports):
            region: Region | None = None
            try:
                if name == "nixl" and self._pulls is not None and opening.staged is not None:
                    region = await self._pulls.open(opening.staged)
                elif name == "shm" and self._shares:
                    region = self._share(num_slots, num_bytes)
            except OSError as error:
                logger.warning(
                    "transport failed; falling back",
                    extra={"transport": name, "from": opening.worker_id, "error": str(error)},
                )
            if region is not None:
                return region
        return None

    def stop(self) -> None:
        """Waits for the transports' threads."""
        if self._pulls is not None:
            self._pulls.thread.shutdown()

    def _share(self, num_slots: int, num_bytes: int) -> SharedRegion | None:
        slot_bytes = -(-min(num_bytes, _MAX_SLOT_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
        if HEADER_BYTES + num_slots * slot_bytes > self.num_free_bytes:
            logger.info("no room for a region", extra={"free_bytes": self.num_free_bytes})
            return None
        slots = ReceiverSlots(num_slots, slot_bytes)
        self.num_free_bytes -= slots.offer.num_bytes
        return SharedRegion(self, slots)
