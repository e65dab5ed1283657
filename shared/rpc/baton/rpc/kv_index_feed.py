"""Keeps a prefix index current: KV events from the bus, and snapshots where events are missing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.core.clock import Clock
from baton.core.cluster import ClusterView, Member, ServiceState
from baton.core.errors import BatonError, InvalidRequest
from baton.core.prefix_index import PrefixIndex
from baton.core.roles import Role
from baton.core.subjects import ALL_KV_EVENTS
from baton.rpc.bus import Bus
from baton.rpc.membership import MembershipView
from baton.rpc.tasks import Tasks
from baton.wire.announcement import kv_event_from_bytes
from baton.wire.control import ControlCaller

logger = logging.getLogger(__name__)

_View = Callable[[], ClusterView]
_KV_ROLES = frozenset({Role.PREFILL, Role.DECODE})
_MIN_RETRY_S = 0.2
_MAX_RETRY_S = 60.0
_MAX_CONCURRENT_SNAPSHOTS = 8


class KvIndexFeed:
    """Feeds `index`. Lives on one event loop; `close` ends what it started.

    A worker is asked when it joins, when an event is missing, and when the bus comes back. A failed
    snapshot is repeated, ever less often, until it comes or the worker leaves. The feed asks 8
    workers at a time, each of them once.
    """

    def __init__(
        self, control: ControlCaller, view: Callable[[], ClusterView], clock: Clock
    ) -> None:
        self.index = PrefixIndex()
        self._control = control
        self._view = view
        self._clock = clock
        self._repairs: dict[str, asyncio.Task[None]] = {}
        """Per worker id."""
        self._tasks = Tasks("KV index")
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT_SNAPSHOTS)
        self.num_events = 0
        self.num_snapshots = 0

    async def start(self, bus: Bus, members: MembershipView) -> None:
        """Begins to listen, and asks the workers that are members already."""
        await bus.subscribe(ALL_KV_EVENTS, self.on_event)
        bus.on_connect(self.on_bus_connected)
        members.on_change(self.on_members)
        self.on_members(members.view())

    async def on_event(self, subject: str, data: bytes) -> None:
        """Takes one KV event from the bus; one that cannot be read is logged and left out."""
        try:
            event = kv_event_from_bytes(data)
        except InvalidRequest as error:
            logger.warning("bad KV event", extra={"subject": subject, "error": error.message})
            return
        if self._view().get(event.worker_id) is None:
            return  # Not a member now: its snapshot is fetched when it joins.
        self.num_events += 1
        if self.index.apply(event.worker_id, event.sequence, event.stored, event.removed):
            self._repair(event.worker_id)

    async def on_bus_connected(self) -> None:
        """Asks every worker again: events may have been lost while there was no bus."""
        for member in self._view():
            if member.status.role in _KV_ROLES:
                self._end_repair(member.worker_id)
                self._repair(member.worker_id)

    def on_members(self, view: ClusterView) -> None:
        """Forgets workers that left, and asks those that joined."""
        for worker_id in self.index.worker_ids | self._repairs.keys():
            if view.get(worker_id) is None:
                self.index.drop_worker(worker_id)
                self._end_repair(worker_id)
        for member in view:
            is_ready = member.status.state is ServiceState.READY
            is_new = member.worker_id not in self.index.worker_ids
            if is_ready and is_new and member.status.role in _KV_ROLES:
                self._repair(member.worker_id)

    async def close(self) -> None:
        """Ends running snapshots."""
        self._repairs.clear()
        await self._tasks.stop()

    def _repair(self, worker_id: str) -> None:
        if worker_id in self._repairs:
            return
        task = self._tasks.spawn(self._load(worker_id), "load a KV snapshot")
        self._repairs[worker_id] = task
        task.add_done_callback(lambda done: self._forget(worker_id, done))

    def _end_repair(self, worker_id: str) -> None:
        if task := self._repairs.pop(worker_id, None):
            task.cancel()

    def _forget(self, worker_id: str, task: asyncio.Task[None]) -> None:
        if self._repairs.get(worker_id) is task:
            del self._repairs[worker_id]

    async def _load(self, worker_id: str) -> None:
        delay_s = _MIN_RETRY_S
        while (member := self._view().get(worker_id)) is not None:
            if await self._is_current_after_snapshot(member):
                return
            await self._clock.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_RETRY_S)

    async def _is_current_after_snapshot(self, member: Member) -> bool:
        worker_id, status = member.worker_id, member.status
        size = sum(status.kv_blocks.values())
        try:
            async with self._slots:
                snapshot = await self._control.kv_snapshot(status.address, num_blocks=size)
        except BatonError as error:
            logger.info("no KV snapshot", extra={"member": worker_id, "error": str(error)})
            return False
        if snapshot.worker_id != worker_id or self._view().get(worker_id) is None:
            return True  # Another process has the address now, or the worker has left.
        self.num_snapshots += 1
        return not self.index.load_snapshot(worker_id, snapshot.sequence, snapshot.block_hashes)
