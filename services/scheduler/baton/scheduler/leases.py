"""Keeps the leases of reservations alive while their prompts are computed and sent."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.scheduler.messages import Reservation
from baton.scheduler.peers import DecodePeer

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_SHORTEST_LEASE_S = 0.3


class Leases:
    """Renews the leases of reservations while prefills run: one call per worker and round."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held: dict[str, dict[str, Reservation]] = defaultdict(dict)
        """Per worker id, per reservation id."""
        self._renewals: dict[str, asyncio.Task[None]] = {}

    @contextmanager
    def kept(self, worker_id: str, peer: DecodePeer, reservation: Reservation) -> Iterator[None]:
        """Keeps a reservation's lease alive within."""
        held = self._held[worker_id]
        held[reservation.reservation_id] = reservation
        if worker_id not in self._renewals:
            # Many requests' leases: in no request's trace.
            renew = self._renew_while_held(worker_id, peer)
            self._renewals[worker_id] = asyncio.create_task(renew, context=Context())
        try:
            yield
        finally:
            held.pop(reservation.reservation_id, None)

    async def close(self) -> None:
        """Stops renewing."""
        tasks = list(self._renewals.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _renew_while_held(self, worker_id: str, peer: DecodePeer) -> None:
        held = self._held[worker_id]
        try:
            while held:
                shortest_s = min(reservation.lease_s for reservation in held.values())
                every_s = max(shortest_s, _SHORTEST_LEASE_S) / _RENEWALS_PER_LEASE
                await self._clock.sleep(every_s)
                if held:
                    await _renew(peer, list(held), timeout_s=every_s)
        finally:
            del self._renewals[worker_id], self._held[worker_id]


async def _renew(peer: DecodePeer, reservation_ids: list[str], timeout_s: float) -> None:
    try:
        unknown = await peer.renew_leases(reservation_ids, timeout_s)
    except BatonError as error:
        logger.debug("renewing leases failed", extra={"reason": error.reason.name})
        return
    if unknown:
        # Their prefills fail by themselves: the worker refuses the push.
        logger.info("leases had ended already", extra={"num_leases": len(unknown)})
