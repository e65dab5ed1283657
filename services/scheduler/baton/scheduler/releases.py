"""Lets go of what attempts hold at their workers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.rpc.tasks import Tasks
from baton.wire.decode import DecodeCaller
from baton.wire.prefill import PrefillCaller

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
_RELEASE_TRIES = 3
_RETRY_DELAY_S = 0.1
_MAX_RELEASES = 4096


class Releases:
    """Sends releases on their own tasks, so that no cancelled request takes them with it.

    A release that fails is retried a few times; after that, the worker's lease ends by itself.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tasks = Tasks("releases")

    def decode(self, peer: DecodeCaller, request_id: str, reservation_id: str, reason: str) -> None:
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

    def prefill(self, peer: PrefillCaller, request_id: str, attempt: int, reason: str) -> None:
        """Lets go of the copy of the KV at a prefill worker."""
        self._start(
            lambda: peer.release(request_id, attempt, reason, RELEASE_TIMEOUT_S), request_id
        )

    async def finish(self, timeout_s: float) -> None:
        """Waits until all releases are sent, or given up."""
        await self._tasks.finish(self._clock, timeout_s)

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
        self._tasks.spawn(self._send(release, request_id, tries), "release")

    async def _send(
        self, release: Callable[[], Awaitable[int]], request_id: str, tries: int
    ) -> None:
        for attempt in range(tries):
            try:
                await release()
            except BatonError as error:
                logger.debug(
                    "release failed", extra={"request_id": request_id, "reason": error.reason.name}
                )
                await self._clock.sleep(_RETRY_DELAY_S * (attempt + 1))
            else:
                return
