"""What goes on beside the requests: letting go of what they held, and keeping their leases."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass

from baton.core.errors import BatonError
from baton.scheduler.messages import Reservation
from baton.scheduler.peers import DecodePeer, PrefillPeer

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
_RELEASE_TRIES = 3
_RETRY_DELAY_S = 0.1
_MAX_RELEASES = 4096
_RENEWALS_PER_LEASE = 3
_SHORTEST_LEASE_S = 0.3


class Releases:
    """Sends releases on their own tasks, so that no cancelled request takes them with it.

    A release that fails is tried again a few times; the worker's lease is the net under it.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def decode(self, peer: DecodePeer, request_id: str, reservation_id: str, reason: str) -> None:
        """Ends a reservation.

        All of the request's where its id is not known; then only once, for a repetition could meet
        the next attempt's.
        """
        self._start(
            lambda: peer.release(
                reservation_id=reservation_id,
                request_id="" if reservation_id else request_id,
                reason=reason,
                timeout_s=RELEASE_TIMEOUT_S,
            ),
            request_id,
            tries=_RELEASE_TRIES if reservation_id else 1,
        )

    def prefill(self, peer: PrefillPeer, request_id: str, attempt: int, reason: str) -> None:
        """Lets go of the copy of the KV at a prefill worker."""
        self._start(
            lambda: peer.release(request_id, attempt, reason, RELEASE_TIMEOUT_S), request_id
        )

    async def finish(self, timeout_s: float) -> None:
        """Waits until all releases are sent, or given up."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()

    def _start(
        self,
        release: Callable[[], Awaitable[int]],
        request_id: str,
        *,
        tries: int = _RELEASE_TRIES,
    ) -> None:
        if len(self._tasks) >= _MAX_RELEASES:
            logger.warning("release skipped, its lease will end", extra={"request_id": request_id})
            return
        task = asyncio.get_running_loop().create_task(_release(release, request_id, tries))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _release(release: Callable[[], Awaitable[int]], request_id: str, tries: int) -> None:
    for attempt in range(tries):
        try:
            await release()
        except BatonError as error:
            logger.debug(
                "release failed", extra={"request_id": request_id, "reason": error.reason.name}
            )
            await asyncio.sleep(_RETRY_DELAY_S * (attempt + 1))
        else:
            return


@dataclass(slots=True)
class _Held:
    peer: DecodePeer
    reservation: Reservation


class Leases:
    """Renews the leases of reservations while prefills run: one call per worker and round."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, _Held]] = defaultdict(dict)
        """Per worker id, per reservation id."""
        self._renewals: dict[str, asyncio.Task[None]] = {}

    @contextmanager
    def kept(self, worker_id: str, peer: DecodePeer, reservation: Reservation) -> Iterator[None]:
        """Keeps a reservation's lease alive within."""
        held = self._held[worker_id]
        held[reservation.reservation_id] = _Held(peer, reservation)
        if worker_id not in self._renewals:
            loop = asyncio.get_running_loop()
            # Many requests' leases: in no request's trace.
            task = loop.create_task(self._renew(worker_id), context=Context())
            self._renewals[worker_id] = task
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

    async def _renew(self, worker_id: str) -> None:
        held = self._held[worker_id]
        try:
            await self._renew_while(held)
        finally:
            del self._renewals[worker_id], self._held[worker_id]

    async def _renew_while(self, held: dict[str, _Held]) -> None:
        while held:
            shortest_s = min(entry.reservation.lease_s for entry in held.values())
            every_s = max(shortest_s, _SHORTEST_LEASE_S) / _RENEWALS_PER_LEASE
            await asyncio.sleep(every_s)
            await _renew_all(dict(held), timeout_s=every_s)


async def _renew_all(held: dict[str, _Held], timeout_s: float) -> None:
    if not held:
        return
    peer = next(iter(held.values())).peer
    call: Coroutine[None, None, list[str]] = peer.renew_leases(list(held), timeout_s)
    try:
        unknown = await call
    except BatonError as error:
        logger.debug("renewing leases failed", extra={"reason": error.reason.name})
        return
    if unknown:
        # Their prefills fail by themselves: the worker refuses the push.
        logger.info("leases had ended already", extra={"num_leases": len(unknown)})
