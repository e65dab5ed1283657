"""The cluster's members: leases announced on the bus, doubts settled by asking the process.

A lease is an announcement on core NATS, measured on the receiver's own clock; the broker stores
nothing, so its restart loses nothing. An ended lease is a reason to ask, not a verdict: a process
that answers GetStatus, if only that it is too busy, stays a member. That one rule covers a dead
bus, a worker cut off from the bus, and static peers without any bus. Two unanswered questions in a
row end a membership.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.cluster import Announcement, ClusterView, Member
from baton.core.errors import BatonError, InvalidRequest, QueueFull
from baton.core.subjects import MEMBER_QUERY, MEMBERS
from baton.rpc.bus import Bus
from baton.rpc.tasks import Tasks
from baton.wire.announcement import announcement_from_bytes, announcement_to_bytes

logger = logging.getLogger(__name__)

MAX_FAILED_POLLS = 2
_TICK_S = 0.1
_POLL_INTERVAL_S = 1.0
_RETRY_INTERVAL_S = 0.25
_SUSPECT_S = 2.0
_MAX_CONCURRENT_POLLS = 16
LOST_MEMORY_S = 300.0
_MAX_LOST = 64

OnChange = Callable[[ClusterView], object]
AskStatus = Callable[[str], Awaitable[Announcement]]
"""Asks the process at an address for its status; raises BatonError."""


@dataclass(slots=True)
class _Poll:
    """What is known about asking one address."""

    next_at_s: float = 0.0
    num_failures: int = 0
    task: asyncio.Task[None] | None = None


class MembershipView:
    """One process's view of all others. Not thread-safe, but `view()` may be called anywhere."""

    def __init__(
        self,
        bus: Bus,
        ask_status: AskStatus,
        *,
        static_addresses: Iterable[str] = (),
        roles: frozenset[str] | None = None,
        own_worker_id: str = "",
        clock: Clock,
    ) -> None:
        self._bus = bus
        self._ask_status = ask_status
        self._static = tuple(static_addresses)
        self._roles = roles
        self._own_worker_id = own_worker_id
        self._clock = clock
        self._view = ClusterView()
        self._callbacks: list[OnChange] = []
        self._lost: dict[str, tuple[Member, float]] = {}
        """Members that ended without a goodbye and when, by address."""
        self._polls: dict[str, _Poll] = {}
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT_POLLS)
        self._tasks = Tasks("membership")

    def view(self) -> ClusterView:
        """The members now: an immutable snapshot."""
        return self._view

    def lost(self) -> list[Member]:
        """Members that stopped answering in the last minutes and were not replaced since."""
        oldest_s = self._clock.now() - LOST_MEMORY_S
        self._lost = {key: entry for key, entry in self._lost.items() if entry[1] >= oldest_s}
        return [member for member, _ in self._lost.values()]

    def on_change(self, callback: OnChange) -> None:
        """Calls `callback` when a member joins, leaves, or changes state (not load)."""
        self._callbacks.append(callback)

    def suspect(self, worker_id: str) -> None:
        """Says that a call to a member failed: it is unusable for 2 s, and asked at once."""
        member = self._view.get(worker_id)
        if member is None:
            return
        self._replace(self._view.suspected(worker_id, self._clock.now() + _SUSPECT_S))
        self._poll_of(member.status.address).next_at_s = 0.0
        self._start_polls()

    def observe(self, announcement: Announcement) -> None:
        """Takes in what a process said about itself, over the bus or in an answer."""
        status = announcement.status
        if self._roles is not None and status.role not in self._roles:
            return
        self._lost.pop(status.address, None)
        view = self._view
        for member in self._view:
            # Ids are per boot: the process that had this address before is gone.
            is_same_address = member.status.address == status.address
            if is_same_address and member.worker_id != status.worker_id:
                view = view.without(member.worker_id)
        self._replace(view.announced(announcement, self._clock.now()))

    async def start(self, on_failure: Callable[[], None] | None = None) -> None:
        """Begins to listen, ask and sweep.

        `on_failure` is called when a background task ends unexpectedly.
        """
        self._tasks.on_failure = on_failure
        await self._bus.subscribe(f"{MEMBERS}.>", self._on_announcement)
        self._bus.on_connect(self._query)
        if self._bus.is_connected:
            await self._query()
        self._tasks.spawn(self._sweep(), "sweep")

    async def stop(self) -> None:
        """Ends all of that."""
        await self._tasks.stop()

    async def _query(self) -> None:
        await self._bus.publish(MEMBER_QUERY, b"")

    async def _on_announcement(self, subject: str, data: bytes) -> None:
        try:
            announcement = announcement_from_bytes(data)
        except InvalidRequest as error:
            logger.warning("bad announcement", extra={"subject": subject, "error": error.message})
            return
        self.observe(announcement)

    async def _sweep(self) -> None:
        while True:
            self._start_polls()
            await self._clock.sleep(_TICK_S)

    def _start_polls(self) -> None:
        now = self._clock.now()
        wanted = set(self._static)
        wanted.update(member.status.address for member in self._view if self._doubts(member, now))
        for address in [key for key, poll in self._polls.items() if poll.task is None]:
            if address not in wanted:
                del self._polls[address]
        for address in wanted:
            poll = self._poll_of(address)
            if poll.task is None and poll.next_at_s <= now:
                poll.next_at_s = now + _POLL_INTERVAL_S
                poll.task = self._tasks.spawn(self._poll(address, poll), "poll")

    def _doubts(self, member: Member, now: float) -> bool:
        if member.worker_id == self._own_worker_id:
            return False
        is_suspect = now < member.suspect_until_s
        return is_suspect or member.lease_ends_at_s <= now or not self._bus.is_connected

    def _poll_of(self, address: str) -> _Poll:
        return self._polls.setdefault(address, _Poll())

    async def _poll(self, address: str, poll: _Poll) -> None:
        try:
            async with self._slots:
                announcement = await self._ask_status(address)
        except QueueFull:
            poll.num_failures = 0  # An answer, though a busy one: the process lives.
        except BatonError as error:
            poll.num_failures += 1
            poll.next_at_s = self._clock.now() + _RETRY_INTERVAL_S
            if poll.num_failures >= MAX_FAILED_POLLS:
                poll.next_at_s = self._clock.now() + _POLL_INTERVAL_S
                self._drop(address, error)
        else:
            poll.num_failures = 0
            # It may have said goodbye while it was asked.
            is_member = any(member.status.address == address for member in self._view)
            if is_member or address in self._static:
                self.observe(announcement)
        finally:
            poll.task = None

    def _drop(self, address: str, error: BatonError) -> None:
        view = self._view
        for member in self._view:
            if member.status.address == address:
                view = view.without(member.worker_id)
                self._lost[address] = (member, self._clock.now())
                logger.warning(
                    "member lost",
                    extra={"member": member.worker_id, "address": address, "error": str(error)},
                )
        while len(self._lost) > _MAX_LOST:
            del self._lost[next(iter(self._lost))]
        self._replace(view)

    def _replace(self, view: ClusterView) -> None:
        before, self._view = self._view, view
        if _outline(before) != _outline(view):
            for callback in self._callbacks:
                callback(view)


def _outline(view: ClusterView) -> set[tuple[object, ...]]:
    """The parts whose change callbacks hear about."""
    return {
        (
            m.worker_id,
            m.status.state,
            m.status.address,
            m.status.model,
            m.status.models,
            m.suspect_until_s,
        )
        for m in view
    }


class Announcer:
    """Announces one process: regularly, when asked, and when its state changes."""

    def __init__(
        self,
        bus: Bus,
        describe: Callable[[], Announcement],
        *,
        observe: Callable[[Announcement], None],
        interval_s: float,
        clock: Clock,
    ) -> None:
        self._bus = bus
        self._describe = describe
        self._observe = observe
        self._interval_s = interval_s
        self._clock = clock
        self._tasks = Tasks("announcer")

    async def start(self, on_failure: Callable[[], None] | None = None) -> None:
        """Begins to announce; `on_failure` is called when that ends unexpectedly."""
        self._tasks.on_failure = on_failure
        await self._bus.subscribe(MEMBER_QUERY, self._on_query)
        self._bus.on_connect(self.announce)
        self._tasks.spawn(self._repeat(), "announce")

    async def announce(self) -> None:
        """Announces the present state now."""
        announcement = self._describe()
        self._observe(announcement)
        status = announcement.status
        subject = f"{MEMBERS}.{status.role}.{status.worker_id}"
        await self._bus.publish(subject, announcement_to_bytes(announcement))

    async def stop(self) -> None:
        """Announces once more (the description says that the process leaves), then no more."""
        await self._tasks.stop()
        await self.announce()
        await self._bus.flush()

    async def _on_query(self, _subject: str, _data: bytes) -> None:
        await self.announce()

    async def _repeat(self) -> None:
        while True:
            await self.announce()
            await self._clock.sleep(self._interval_s)
