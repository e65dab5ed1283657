"""Memory that senders write chunks into: one region per push, within a budget.

A region is never used by a second push, so a sender that writes late writes where nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from baton.rpc.shared_memory import HEADER_BYTES, IS_SUPPORTED, ReceiverSlots

logger = logging.getLogger(__name__)
_MAX_SLOT_BYTES = 4 << 20
_PAGE_BYTES = 4096


class Regions:
    """All regions of this worker."""

    def __init__(self, names: Sequence[str], max_bytes: int) -> None:
        """`names` are the transports allowed."""
        self._allowed = {"shm"} & set(names) if IS_SUPPORTED else set()
        self._num_free_bytes = max_bytes

    def open(self, wanted: Sequence[str], num_slots: int, num_bytes: int) -> ReceiverSlots | None:
        """A region for a push of `num_bytes`; None when its bytes have to come by the stream."""
        if not num_bytes or "shm" not in self._allowed.intersection(wanted):
            return None
        slot_bytes = -(-min(num_bytes, _MAX_SLOT_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
        if HEADER_BYTES + num_slots * slot_bytes > self._num_free_bytes:
            logger.info("no room for a region", extra={"free_bytes": self._num_free_bytes})
            return None
        try:
            slots = ReceiverSlots(num_slots, slot_bytes)
        except OSError as error:
            logger.warning("no shared memory", extra={"error": str(error)})
            return None
        self._num_free_bytes -= slots.offer.num_bytes
        return slots

    def close(self, slots: ReceiverSlots) -> None:
        """Ends a region; call it once."""
        slots.close()
        self._num_free_bytes += slots.offer.num_bytes
