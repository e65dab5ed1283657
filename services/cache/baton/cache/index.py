"""Keeps the prefix index current: events in, snapshots where events are missing, leavers out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from baton.core.cluster import ClusterView, ServiceState
from baton.core.errors import BatonError, InvalidRequest
from baton.core.prefix_index import PrefixIndex
from baton.rpc.peers import KvSnapshot
from baton.wire.cluster import kv_event_from_bytes

logger = logging.getLogger(__name__)

_KV_ROLES = frozenset({"prefill", "decode"})
_MAX_ATTEMPTS = 5
_RETRY_DELAY_S = 0.2
_MAX_CONCURRENT_SNAPSHOTS = 8


class SnapshotSource(Protocol):
    """Asks a worker for its blocks."""

    async def kv_snapshot(self, address: str) -> KvSnapshot:
        """The blocks that a worker holds."""


class ClusterIndex:
    """The cluster's prefix index. Lives on one event loop; `close` ends what it started."""

    def __init__(self, source: SnapshotSource, view: Callable[[], ClusterView]) -> None:
        self.blocks = PrefixIndex()
        self._source = source
        self._view = view
        self._mending: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT_SNAPSHOTS)
        self.num_events = 0
        self.num_snapshots = 0

    async def on_event(self, _subject: str, data: bytes) -> None:
        """Takes one KV event from the bus; one that cannot be read is logged and left out."""
        try:
            event = kv_event_from_bytes(data)
        except InvalidRequest as error:
            logger.warning("unreadable KV event", extra={"error": error.message})
            return
        if self._view().get(event.worker_id) is None:
            return  # Not a member (yet, or any more): its snapshot is fetched when it joins.
        self.num_events += 1
        if self.blocks.apply(event.worker_id, event.sequence, event.stored, event.removed):
            self._mend(event.worker_id)

    async def on_bus_connected(self) -> None:
        """Asks every worker again: events may have been lost while there was no bus."""
        for member in self._view():
            if member.status.role in _KV_ROLES:
                self._mend(member.worker_id)

    def on_members(self, view: ClusterView) -> None:
        """Takes a change of the members: forgets leavers, asks newcomers what they hold."""
        members = {member.worker_id for member in view}
        for worker_id in self.blocks.worker_ids - members:
            self.blocks.drop_worker(worker_id)
        for worker_id in list(self._mending):
            if worker_id not in members:
                self._mending.pop(worker_id).cancel()
        for member in view:
            status = member.status
            has_kv = status.role in _KV_ROLES and status.state is ServiceState.READY
            if has_kv and member.worker_id not in self.blocks.worker_ids:
                self._mend(member.worker_id)

    async def close(self) -> None:
        """Ends running snapshots."""
        tasks = list(self._mending.values())
        self._mending.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _mend(self, worker_id: str) -> None:
        if worker_id in self._mending:
            return
        task = asyncio.get_running_loop().create_task(self._load_snapshot(worker_id))
        self._mending[worker_id] = task
        task.add_done_callback(lambda done: self._forget(worker_id, done))

    def _forget(self, worker_id: str, task: asyncio.Task[None]) -> None:
        if self._mending.get(worker_id) is task:
            del self._mending[worker_id]

    async def _load_snapshot(self, worker_id: str) -> None:
        for attempt in range(_MAX_ATTEMPTS):
            member = self._view().get(worker_id)
            if member is None:
                return
            try:
                async with self._slots:
                    snapshot = await self._source.kv_snapshot(member.status.address)
            except BatonError as error:
                logger.info(
                    "KV snapshot failed",
                    extra={"peer": worker_id, "reason": error.reason.name, "attempt": attempt},
                )
            else:
                if snapshot.worker_id != worker_id or self._view().get(worker_id) is None:
                    return  # Somebody else is at that address now, or it has left meanwhile.
                self.num_snapshots += 1
                if not self.blocks.load_snapshot(
                    worker_id, snapshot.sequence, snapshot.block_hashes
                ):
                    return
            await asyncio.sleep(_RETRY_DELAY_S * 2**attempt)
