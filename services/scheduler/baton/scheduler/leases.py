"""Keeps the leases of reservations alive while their prompts are computed and sent."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.rpc.tasks import Tasks
from baton.wire.decode import DecodeCaller, KvReservation

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_SHORTEST_LEASE_S = 0.3


class Leases:
    """Renews the leases of reservations while prefills run: one call per worker and round."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held: dict[str, dict[str, KvReservation]] = defaultdict(dict)
        """Per worker id, per reservation id; a task renews those of each worker."""
        self._tasks = Tasks("leases")

    @contextmanager
    def kept(
        self, worker_id: str, peer: DecodeCaller, reservation: KvReservation
    ) -> Iterator[None]:
        """Keeps a reservation's lease alive within."""
        is_renewed = worker_id in self._held
        held = self._held[worker_id]
        held[reservation.reservation_id] = reservation
        if not is_renewed:
            # Many requests' leases: in no request's trace.
            renew = self._renew_while_held(worker_id, peer)
            self._tasks.spawn(renew, "renew leases", context=Context())
        try:
            yield
        finally:
            held.pop(reservation.reservation_id, None)

    async def close(self) -> None:
        """Stops renewing."""
        await self._tasks.stop()

    async def _renew_while_held(self, worker_id: str, peer: DecodeCaller) -> None:
        held = self._held[worker_id]
        try:
            while held:
                shortest_s = min(reservation.lease_s for reservation in held.values())
                every_s = max(shortest_s, _SHORTEST_LEASE_S) / _RENEWALS_PER_LEASE
                await self._clock.sleep(every_s)
                if held:
                    await _renew(peer, list(held), timeout_s=every_s)
        finally:
            del self._held[worker_id]


async def _renew(peer: DecodeCaller, reservation_ids: list[str], timeout_s: float) -> None:
    try:
        unknown = (await peer.renew_leases(reservation_ids, timeout_s)).unknown_ids
    except BatonError as error:
        logger.debug("renewing leases failed", extra={"reason": error.reason.name})
        return
    if unknown:
        # Their prefills fail by themselves: the worker refuses the push.
        logger.info("leases had ended already", extra={"num_leases": len(unknown)})
