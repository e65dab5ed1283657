"""The cluster index: follows events, mends gaps by asking, forgets who leaves."""

from __future__ import annotations

import pytest

from baton.core.cluster import Announcement, ClusterView, ServiceState, ServiceStatus
from baton.core.errors import NoWorker
from baton.rpc.kv_index_feed import KvIndexFeed
from baton.wire.announcement import KvEvent, kv_event_to_bytes
from baton.wire.clock import SystemClock
from baton.wire.control import KvSnapshot
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
        self.num_blocks: list[int] = []

    def join(self, worker_id: str = "w1", role: str = "prefill") -> None:
        status = ServiceStatus(worker_id, role, address=f"{worker_id}:1", state=ServiceState.READY)
        self.view = self.view.announced(Announcement(status, lease_s=3.0), now=0.0)

    async def kv_snapshot(self, address: str, *, num_blocks: int) -> KvSnapshot:
        self.asked.append(address)
        self.num_blocks.append(num_blocks)
        if self.num_failures:
            self.num_failures -= 1
            raise NoWorker("not there")
        return self.snapshot


def make() -> tuple[Cluster, KvIndexFeed]:
    cluster = Cluster()
    return cluster, KvIndexFeed(cluster, lambda: cluster.view, SystemClock())


async def test_newcomer_is_asked_what_it_holds() -> None:
    cluster, feed = make()
    cluster.snapshot = KvSnapshot("w1", 5, (block(1), block(2)))
    cluster.join()
    cluster.join("g1", role="gateway")
    feed.on_members(cluster.view)
    await eventually(lambda: feed.index.match([block(1), block(2)]) == {"w1": 2})
    assert cluster.asked == ["w1:1"]


async def test_gap_is_mended_by_a_snapshot_and_failures_are_retried() -> None:
    cluster, feed = make()
    cluster.join()
    await feed.on_event(SUBJECT, event(1, [1]))
    cluster.snapshot = KvSnapshot("w1", 3, (block(1), block(2), block(3)))
    cluster.num_failures = 1
    await feed.on_event(SUBJECT, event(3, [3]))
    assert feed.index.has_gap("w1")
    await eventually(lambda: not feed.index.has_gap("w1"))
    assert feed.index.num_blocks("w1") == 3
    assert len(cluster.asked) == 2


async def test_one_snapshot_at_a_time_per_worker() -> None:
    cluster, feed = make()
    cluster.join()
    cluster.snapshot = KvSnapshot("w1", 9, ())
    for sequence in range(3, 9):
        await feed.on_event(SUBJECT, event(sequence, [sequence]))
    await eventually(lambda: not feed.index.has_gap("w1"))
    assert len(cluster.asked) == 1


async def test_worker_that_left_is_forgotten_and_its_late_events_are_ignored() -> None:
    cluster, feed = make()
    cluster.join()
    await feed.on_event(SUBJECT, event(1, [1]))
    cluster.view = ClusterView()
    feed.on_members(cluster.view)
    await feed.on_event(SUBJECT, event(2, [2]))
    assert feed.index.worker_ids == frozenset()


async def test_reconnected_bus_asks_everybody_again() -> None:
    cluster, feed = make()
    cluster.join()
    await feed.on_event(SUBJECT, event(1, [1]))
    cluster.snapshot = KvSnapshot("w1", 4, (block(7),))
    await feed.on_bus_connected()
    await eventually(lambda: feed.index.match([block(7)]) == {"w1": 1})


async def test_another_worker_at_the_address_changes_nothing() -> None:
    cluster, feed = make()
    cluster.join()
    cluster.snapshot = KvSnapshot("w2", 1, (block(1),))
    feed.on_members(cluster.view)
    await eventually(lambda: cluster.asked)
    await feed.close()
    assert feed.index.match([block(1)]) == {}


async def test_unreadable_event_is_left_out() -> None:
    cluster, feed = make()
    cluster.join()
    await feed.on_event(SUBJECT, b"\xff\xff")
    await feed.on_event(SUBJECT, event(1, [1]))
    assert feed.index.num_blocks("w1") == 1


async def test_close_ends_running_snapshots() -> None:
    cluster, feed = make()
    cluster.num_failures = 100
    cluster.join()
    feed.on_members(cluster.view)
    await eventually(lambda: cluster.asked)
    await feed.close()
    asked = len(cluster.asked)
    feed.on_members(cluster.view)
    assert len(cluster.asked) == asked
    await feed.close()


async def test_worker_says_how_many_blocks_its_snapshot_may_have() -> None:
    cluster, feed = make()
    status = ServiceStatus(
        "w1", "prefill", "w1:1", state=ServiceState.READY, kv_blocks={"free": 5, "cached": 7}
    )
    cluster.view = cluster.view.announced(Announcement(status, lease_s=3.0), now=0.0)
    feed.on_members(cluster.view)
    await eventually(lambda: cluster.num_blocks == [12])
    await feed.close()


async def test_snapshot_that_never_comes_is_asked_for_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if len(slept) == 12:
            cluster.view = ClusterView()

    cluster, feed = make()
    monkeypatch.setattr(feed._clock, "sleep", sleep)
    cluster.num_failures = 100
    cluster.join()
    await feed._load("w1")
    assert slept == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0, 60.0, 60.0]
