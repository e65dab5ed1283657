"""Which requests start, wait, or are refused: a bounded queue per model.

Higher priority first, then order of arrival. What cannot start before its deadline is refused at
once, with the delay after which a retry may succeed.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from baton.core.errors import InvalidRequest, QueueFull

MAX_PRIORITY = 100
"""Priorities range from minus this to this; 0 is the default."""
_MIN_RETRY_AFTER_S = 0.1
_MAX_RETRY_AFTER_S = 30.0
_SMOOTHING = 0.2
"""Weight of the newest interval between two finished requests."""


def check_priority(priority: int) -> int:
    """Returns a caller's priority unchanged.

    Raises:
        InvalidRequest: it is out of range.
    """
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}"
        )
    return priority


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A request's place: tickets sort in the order in which they are served."""

    negated_priority: int
    arrival: int
    """Counts requests; a request that is put back keeps its number."""
    request_id: str = field(compare=False)
    model: str = field(compare=False)


class _ModelQueue:
    def __init__(self) -> None:
        self.waiting: list[Ticket] = []
        self.running: set[str] = set()
        self.blocked_until_s = 0.0
        self.last_finish_s: float | None = None
        self.finish_interval_s = 0.0

    def finished(self, now: float) -> None:
        if self.last_finish_s is not None:
            interval_s = now - self.last_finish_s
            weight = _SMOOTHING if self.finish_interval_s else 1.0
            self.finish_interval_s += weight * (interval_s - self.finish_interval_s)
        # While no request waits, the next interval would measure idleness.
        self.last_finish_s = now if self.waiting else None


class Admission:
    """Waiting and running requests per model. Pure: the owner passes the time and wakes waiters."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        """Per model."""
        self._queues: dict[str, _ModelQueue] = {}
        self._arrivals = 0

    def offer(
        self, request_id: str, model: str, *, priority: int, deadline_s: float, now: float
    ) -> Ticket:
        """Puts a request in its model's queue.

        Raises:
            QueueFull: the queue is full, or so long that the deadline would pass in it.
        """
        queue = self._queue(model)
        wait_s = len(queue.waiting) * queue.finish_interval_s
        if len(queue.waiting) >= self._max_waiting:
            raise QueueFull(
                f"{len(queue.waiting)} requests wait for model {model!r}, the most allowed",
                retry_after_s=self.retry_after_s(model),
            )
        if now + wait_s > deadline_s:
            raise QueueFull(
                f"about {wait_s:.1f} s of requests wait for model {model!r}, longer than this"
                " request's deadline allows",
                retry_after_s=self.retry_after_s(model),
            )
        self._arrivals += 1
        ticket = Ticket(-priority, self._arrivals, request_id, model)
        insort(queue.waiting, ticket)
        return ticket

    def admit(self, model: str, capacity: int, now: float) -> list[Ticket]:
        """Moves waiting requests to running while fewer than `capacity` run; returns them."""
        queue = self._queue(model)
        if now < queue.blocked_until_s:
            return []
        num_free = max(0, capacity - len(queue.running))
        admitted = queue.waiting[:num_free]
        del queue.waiting[:num_free]
        queue.running.update(ticket.request_id for ticket in admitted)
        return admitted

    def put_back(self, ticket: Ticket, blocked_until_s: float) -> None:
        """Lets an admitted request wait again, in its old place: no worker had room.

        No other request of the model starts before `blocked_until_s` or the next finished request:
        those behind must not overtake it. It gets its place even when the queue is full.
        """
        queue = self._queue(ticket.model)
        queue.running.discard(ticket.request_id)
        insort(queue.waiting, ticket)
        queue.blocked_until_s = blocked_until_s

    def leave(self, ticket: Ticket, now: float) -> None:
        """Forgets a request, waiting or running. Idempotent."""
        queue = self._queue(ticket.model)
        if ticket.request_id in queue.running:
            queue.running.remove(ticket.request_id)
            queue.blocked_until_s = 0.0
            queue.finished(now)
        elif ticket in queue.waiting:
            queue.waiting.remove(ticket)

    def blocked_until_s(self, model: str) -> float:
        """When the model's queue moves again by itself; 0 when it is not blocked."""
        return self._queue(model).blocked_until_s

    def retry_after_s(self, model: str) -> float:
        """How long the present queue should take, for those sent away."""
        queue = self._queue(model)
        estimate_s = (len(queue.waiting) + 1) * queue.finish_interval_s
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, estimate_s))

    def num_waiting(self) -> int:
        """Over all models."""
        return sum(len(queue.waiting) for queue in self._queues.values())

    def num_running(self) -> int:
        """Over all models."""
        return sum(len(queue.running) for queue in self._queues.values())

    def _queue(self, model: str) -> _ModelQueue:
        # Model names were checked against the served ones, so this stays small.
        return self._queues.setdefault(model, _ModelQueue())
