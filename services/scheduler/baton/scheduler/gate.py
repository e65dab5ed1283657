"""Admission as requests see it: each waits here for its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context

from baton.core.admission import Admission, Ticket, check_priority
from baton.core.clock import Clock
from baton.core.errors import KvCacheFull, QueueFull, WorkerDraining
from baton.rpc.tasks import Tasks

_FULL_RETRY_S = 0.25
"""How long no request of a model starts after all its workers said that they are full."""


class Entrance:
    """Lets requests of all kinds in, while there is room and until the scheduler drains."""

    def __init__(self, max_live: int) -> None:
        self._max_live = max_live
        self._num_live = 0
        self._is_draining = False

    @contextmanager
    def entered(self, priority: int) -> Iterator[None]:
        """Counts a request as live within.

        Raises:
            WorkerDraining: the scheduler takes no more requests.
            InvalidRequest: the priority is out of range.
            QueueFull: the limit on live requests is reached.
        """
        if self._is_draining:
            raise WorkerDraining("this scheduler is about to stop", retry_after_s=1.0)
        check_priority(priority)
        if self._num_live >= self._max_live:
            raise QueueFull(
                f"{self._num_live} requests are at this scheduler, the most allowed",
                retry_after_s=1.0,
            )
        self._num_live += 1
        try:
            yield
        finally:
            self._num_live -= 1

    def close(self) -> None:
        """Refuses further requests."""
        self._is_draining = True


class AdmissionGate:
    """Lets as many requests of a model run as its workers have places."""

    def __init__(self, admission: Admission, capacity: Callable[[str], int], clock: Clock) -> None:
        self._admission = admission
        self._capacity = capacity
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[None]] = {}
        """Per request id."""
        self._blocked: set[str] = set()
        """Models whose queues a timer will unblock."""
        self._timers = Tasks("admission")

    async def enter(
        self, request_id: str, model: str, *, priority: int, deadline_s: float
    ) -> Ticket:
        """Waits for admission; give the ticket back with `leave`, always.

        Raises:
            QueueFull: too many wait already.
        """
        now = self._clock.now()
        ticket = self._admission.offer(
            request_id, model, priority=priority, deadline_s=deadline_s, now=now
        )
        await self._wait(ticket)
        return ticket

    async def wait_again(self, ticket: Ticket, limit_s: float) -> None:
        """Waits at the old place in the queue: no worker had room.

        Raises:
            KvCacheFull: it took longer than `limit_s`.
        """
        self._admission.put_back(ticket, self._clock.now() + _FULL_RETRY_S)
        try:
            async with self._clock.timeout(limit_s):
                await self._wait(ticket)
        except TimeoutError as error:
            raise KvCacheFull(
                f"the workers of model {ticket.model!r} had no KV blocks free for {limit_s:.0f} s",
                retry_after_s=self._admission.retry_after_s(ticket.model),
            ) from error

    def leave(self, ticket: Ticket) -> None:
        """Ends a request's stay and lets the next ones in. Idempotent."""
        self._admission.leave(ticket, self._clock.now())
        self.advance(ticket.model)

    def advance(self, model: str) -> None:
        """Lets in those that fit: call it when there may be more room."""
        for ticket in self._admission.admit(model, self._capacity(model), self._clock.now()):
            turn = self._waiting.get(ticket.request_id)
            if turn is not None and not turn.done():
                turn.set_result(None)
        blocked_until_s = self._admission.blocked_until_s(model)
        delay_s = blocked_until_s - self._clock.now()
        if delay_s > 0 and model not in self._blocked:
            self._blocked.add(model)
            unblock = self._unblock(model, delay_s + 0.001)
            self._timers.spawn(unblock, f"unblock {model}", context=Context())

    async def close(self) -> None:
        """Stops the timers."""
        await self._timers.stop()

    async def _unblock(self, model: str, delay_s: float) -> None:
        try:
            await self._clock.sleep(delay_s)
        finally:
            self._blocked.discard(model)
        self.advance(model)

    async def _wait(self, ticket: Ticket) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket.request_id] = turn
        self.advance(ticket.model)
        try:
            await turn
        except asyncio.CancelledError:
            self.leave(ticket)
            raise
        finally:
            del self._waiting[ticket.request_id]
