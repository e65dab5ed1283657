"""Which transport the bytes of chunks take to which decode worker.

All frames go over the push's own stream, whatever carries the bytes: order, epochs, checksums,
credits and the commit are the same for all. What fails is left out for that worker for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from baton.core.handoff.frames import SlotOffer
from baton.prefill.staging import StagedSlots, Staging
from baton.rpc.shared_memory import IS_SUPPORTED, SenderSlots

logger = logging.getLogger(__name__)
_AVOIDED_S = 60.0
_MAX_REMEMBERED = 1024
_MAX_IDLE = 8


class Transports:
    """The transports of this worker, and which of them failed lately."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        clock: Callable[[], float],
        on_fallback: Callable[[str, str], None],
    ) -> None:
        """`names` are tried in order; `on_fallback` gets a transport that failed, and at what.

        Takes about half a second where "nixl" is among them.
        """
        self._clock = clock
        self._on_fallback = on_fallback
        self._failed_at_s: dict[tuple[str, str], float] = {}
        self._names = ["shm"] if "shm" in names and IS_SUPPORTED else []
        self._idle: dict[bytes, SenderSlots] = {}
        self._staging: Staging | None = None
        if "nixl" in names:
            try:
                self._staging = Staging()
            except OSError as error:
                self.failed("", "nixl", "start", error)
            else:
                self._names.insert(names.index("nixl"), "nixl")

    @classmethod
    def none(cls) -> Transports:
        """Everything goes with the frames."""
        return cls((), clock=time.monotonic, on_fallback=lambda *_: None)

    def wanted(self, address: str) -> list[str]:
        """What to ask the worker at `address` for, best first; without any it is the stream."""
        now = self._clock()
        return [
            name
            for name in self._names
            if now - self._failed_at_s.get((address, name), -_AVOIDED_S) >= _AVOIDED_S
        ]

    def stage(self) -> StagedSlots | None:
        """Slots for a push of which NIXL may be wanted; None when there are none left."""
        return self._staging.lease() if self._staging is not None else None

    def open(self, address: str, offer: SlotOffer) -> SenderSlots | None:
        """The slots that a worker offers; None when it is not memory that is seen here."""
        try:
            return self._idle.pop(offer.token, None) or SenderSlots(offer)
        except OSError as error:
            self.failed(address, "shm", "open", error)
            return None

    def keep(self, slots: SenderSlots) -> None:
        """Has a worker's slots ready for when it offers them again, after a committed push."""
        self._idle[slots.offer.token] = slots
        if len(self._idle) > _MAX_IDLE:
            self._idle.pop(next(iter(self._idle)))

    def close(self) -> None:
        """Lets go of idle memory."""
        self._idle.clear()

    def declined(self, name: str) -> None:
        """A worker did not offer the transport: it has no room, or does not use it."""
        self._on_fallback(name, "declined")

    def failed(self, address: str, name: str, at: str, error: Exception) -> None:
        """The transport did not work; the next one in order is used for this worker for a while."""
        self._on_fallback(name, at)
        key = (address, name)
        if key not in self._failed_at_s:
            logger.warning(
                "transport failed; falling back",
                extra={"address": address, "transport": name, "at": at, "error": str(error)},
            )
        self._failed_at_s.pop(key, None)
        self._failed_at_s[key] = self._clock()
        if len(self._failed_at_s) > _MAX_REMEMBERED:
            self._failed_at_s.pop(next(iter(self._failed_at_s)))
