"""The cluster index: follows events, mends gaps by asking, forgets who leaves."""

from __future__ import annotations

from baton.cache.index import ClusterIndex
from baton.core.cluster import Announcement, ClusterView, ServiceState, ServiceStatus
from baton.core.errors import NoWorker
from baton.rpc.peers import KvSnapshot
from baton.wire.cluster import KvEvent, kv_event_to_bytes
from tests.support.eventually import eventually

SUBJECT = "baton.kv.w1"


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


def event(sequence: int, stored: list[int], removed: list[int] | None = None) -> bytes:
    return kv_event_to_bytes(
        KvEvent(
            worker_id="w1",
            sequence=sequence,
            stored=tuple(map(block, stored)),
            removed=tuple(map(block, removed or [])),
        )
    )


class Cluster:
    """A view that changes, and a worker that can be asked."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.snapshot = KvSnapshot("w1", 0, ())
        self.num_failures = 0
        self.asked: list[str] = []

    def join(self, worker_id: str = "w1", role: str = "prefill") -> None:
        status = ServiceStatus(worker_id, role, address=f"{worker_id}:1", state=ServiceState.READY)
        self.view = self.view.announced(Announcement(status, lease_s=3.0), now=0.0)

    async def kv_snapshot(self, address: str) -> KvSnapshot:
        self.asked.append(address)
        if self.num_failures:
            self.num_failures -= 1
            raise NoWorker("not there")
        return self.snapshot


def make() -> tuple[Cluster, ClusterIndex]:
    cluster = Cluster()
    return cluster, ClusterIndex(cluster, lambda: cluster.view)


async def test_newcomer_is_asked_what_it_holds() -> None:
    cluster, index = make()
    cluster.snapshot = KvSnapshot("w1", 5, (block(1), block(2)))
    cluster.join()
    cluster.join("g1", role="gateway")
    index.on_members(cluster.view)
    await eventually(lambda: index.blocks.match([block(1), block(2)]) == {"w1": 2})
    assert cluster.asked == ["w1:1"]


async def test_gap_is_mended_by_a_snapshot_and_failures_are_retried() -> None:
    cluster, index = make()
    cluster.join()
    await index.on_event(SUBJECT, event(1, [1]))
    cluster.snapshot = KvSnapshot("w1", 3, (block(1), block(2), block(3)))
    cluster.num_failures = 1
    await index.on_event(SUBJECT, event(3, [3]))
    assert index.blocks.has_gap("w1")
    await eventually(lambda: not index.blocks.has_gap("w1"))
    assert index.blocks.num_blocks("w1") == 3
    assert len(cluster.asked) == 2


async def test_one_snapshot_at_a_time_per_worker() -> None:
    cluster, index = make()
    cluster.join()
    cluster.snapshot = KvSnapshot("w1", 9, ())
    for sequence in range(3, 9):
        await index.on_event(SUBJECT, event(sequence, [sequence]))
    await eventually(lambda: not index.blocks.has_gap("w1"))
    assert len(cluster.asked) == 1


async def test_worker_that_left_is_forgotten_and_its_late_events_are_ignored() -> None:
    cluster, index = make()
    cluster.join()
    await index.on_event(SUBJECT, event(1, [1]))
    cluster.view = ClusterView()
    index.on_members(cluster.view)
    await index.on_event(SUBJECT, event(2, [2]))
    assert index.blocks.worker_ids == frozenset()


async def test_reconnected_bus_asks_everybody_again() -> None:
    cluster, index = make()
    cluster.join()
    await index.on_event(SUBJECT, event(1, [1]))
    cluster.snapshot = KvSnapshot("w1", 4, (block(7),))
    await index.on_bus_connected()
    await eventually(lambda: index.blocks.match([block(7)]) == {"w1": 1})


async def test_another_worker_at_the_address_changes_nothing() -> None:
    cluster, index = make()
    cluster.join()
    cluster.snapshot = KvSnapshot("w2", 1, (block(1),))
    index.on_members(cluster.view)
    await eventually(lambda: cluster.asked)
    await index.close()
    assert index.blocks.match([block(1)]) == {}


async def test_unreadable_event_is_left_out() -> None:
    cluster, index = make()
    cluster.join()
    await index.on_event(SUBJECT, b"\xff\xff")
    await index.on_event(SUBJECT, event(1, [1]))
    assert index.blocks.num_blocks("w1") == 1


async def test_close_ends_running_snapshots() -> None:
    cluster, index = make()
    cluster.num_failures = 100
    cluster.join()
    index.on_members(cluster.view)
    await eventually(lambda: cluster.asked)
    await index.close()
    asked = len(cluster.asked)
    index.on_members(cluster.view)
    assert len(cluster.asked) == asked
    await index.close()
