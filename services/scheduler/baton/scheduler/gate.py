"""Admission as requests see it: wait here until it is your turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.core.admission import Admission, Ticket
from baton.core.errors import KvCacheFull

_FULL_RETRY_S = 0.25
"""How long nobody of a model starts after all its workers said that they are full."""


class Gate:
    """Lets as many requests of a model run as its workers have places."""

    def __init__(
        self, admission: Admission, capacity: Callable[[str], int], clock: Callable[[], float]
    ) -> None:
        self._admission = admission
        self._capacity = capacity
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[None]] = {}
        """Per request id."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """Per model, while its queue is blocked."""

    async def enter(
        self, request_id: str, model: str, *, priority: int, deadline_s: float
    ) -> Ticket:
        """Waits for admission; give the ticket back with `leave`, always.

        Raises:
            QueueFull: too many wait already.
        """
        now = self._clock()
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
        self._admission.put_back(ticket, self._clock() + _FULL_RETRY_S)
        try:
            async with asyncio.timeout(limit_s):
                await self._wait(ticket)
        except TimeoutError as error:
            raise KvCacheFull(
                f"the workers of model {ticket.model!r} had no KV blocks free for {limit_s:.0f} s",
                retry_after_s=self._admission.retry_after_s(ticket.model),
            ) from error

    def leave(self, ticket: Ticket) -> None:
        """Ends a request's stay and lets the next ones in. Idempotent."""
        self._admission.leave(ticket, self._clock())
        self.advance(ticket.model)

    def advance(self, model: str) -> None:
        """Lets in whoever may come in: call it when there may be more room."""
        for ticket in self._admission.admit(model, self._capacity(model), self._clock()):
            turn = self._waiting.get(ticket.request_id)
            if turn is not None and not turn.done():
                turn.set_result(None)
        blocked_until_s = self._admission.blocked_until_s(model)
        delay_s = blocked_until_s - self._clock()
        if delay_s > 0 and model not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[model] = loop.call_later(delay_s + 0.001, self._unblock, model)

    def close(self) -> None:
        """Stops the timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _unblock(self, model: str) -> None:
        self._timers.pop(model, None)
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
