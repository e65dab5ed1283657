"""The transports by name: which ones a worker may use, and which of them failed lately."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from baton.core.clock import Clock
from baton.core.handoff.frames import Opening
from baton.handoff.transports import grpc, nixl, shm
from baton.handoff.transports.transport import Inlet, Outlet, ReceiverEnd, SenderEnd, Transport

logger = logging.getLogger(__name__)
TRANSPORTS: Mapping[str, Transport] = {"nixl": nixl, "shm": shm, "grpc": grpc}
_ALWAYS = "grpc"
"""Needs no agreement and works everywhere, hence it is the last of every list."""
_AVOIDED_S = 60.0
_MAX_REMEMBERED = 1024


def parse_transports(text: str) -> tuple[str, ...]:
    """Transports of "shm,grpc", in order.

    Raises:
        ValueError: one is not known or occurs twice, or the last is not the one that always works.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(TRANSPORTS) or len(set(names)) != len(names) or names[-1] != _ALWAYS:
        raise ValueError(
            f"must be some of {', '.join(TRANSPORTS)}, the last one {_ALWAYS}; got {text!r}"
        )
    return names


class SenderTransports:
    """The transports of a sending worker."""

    def __init__(
        self, names: Sequence[str], *, clock: Clock, on_fallback: Callable[[str, str], None]
    ) -> None:
        """`names` are tried in order; `on_fallback` gets a transport that failed, and at what.

        Takes about half a second where NIXL is among them.
        """
        self._clock = clock
        self._on_fallback = on_fallback
        self._failed_at_s: dict[tuple[str, str], float] = {}
        self._ends: dict[str, SenderEnd] = {}
        for name in names:
            try:
                self._ends[name] = TRANSPORTS[name].sender()
            except OSError as error:
                self.failed("", name, "start", error)

    def outlets(self, address: str) -> dict[str, Outlet]:
        """What a push to the worker at `address` can use, best first; the last always works."""
        now = self._clock.now()
        return {
            name: end.outlet()
            for name, end in self._ends.items()
            if now - self._failed_at_s.get((address, name), -_AVOIDED_S) >= _AVOIDED_S
        }

    def declined(self, name: str) -> None:
        """Notes that a worker did not offer the transport: it has no room, or does not use it."""
        self._on_fallback(name, "declined")

    def failed(self, address: str, name: str, at: str, error: Exception) -> None:
        """Notes that a transport failed; pushes to that worker avoid it for a while."""
        self._on_fallback(name, at)
        key = (address, name)
        if key not in self._failed_at_s:
            logger.warning(
                "transport failed; falling back",
                extra={"address": address, "transport": name, "at": at, "error": str(error)},
            )
        self._failed_at_s.pop(key, None)
        self._failed_at_s[key] = self._clock.now()
        if len(self._failed_at_s) > _MAX_REMEMBERED:
            self._failed_at_s.pop(next(iter(self._failed_at_s)))

    def close(self) -> None:
        """Lets go of idle memory."""
        for end in self._ends.values():
            end.close()


class ReceiverTransports:
    """The transports of a receiving worker."""

    def __init__(self, names: Sequence[str], max_bytes: int) -> None:
        """`names` are those allowed. Takes half a second where NIXL is among them."""
        self._ends: dict[str, ReceiverEnd] = {}
        for name in names:
            try:
                self._ends[name] = TRANSPORTS[name].receiver(max_bytes)
            except OSError as error:
                logger.warning("transport left out", extra={"error": str(error)})

    async def open(self, opening: Opening, num_slots: int) -> Inlet:
        """The first of the sender's transports that works here; the stream itself if none does."""
        for name in dict.fromkeys((*opening.transports, _ALWAYS)):
            end = self._ends.get(name)
            try:
                inlet = await end.inlet(opening, num_slots) if end is not None else None
            except OSError as error:
                logger.warning(
                    "transport failed; falling back",
                    extra={"transport": name, "from": opening.worker_id, "error": str(error)},
                )
                continue
            if inlet is not None:
                return inlet
        return grpc.StreamInlet()

    def close(self) -> None:
        """Lets go of idle memory and waits for the transports' threads."""
        for end in self._ends.values():
            end.close()
