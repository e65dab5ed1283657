"""Which replica of the cache service is asked: by the key, the same after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from baton.core.cluster import Announcement, ClusterView, ServiceState, ServiceStatus
from baton.core.errors import NoWorker
from baton.rpc.cache_access import CacheAccess, rpc_caches
from baton.wire.channel import ChannelPool

KEYS = [number.to_bytes(16, "big") for number in range(300)]


def status(number: int, boot: int = 0, store: bool = True, uptime_s: float = 5.0) -> ServiceStatus:
    return ServiceStatus(
        f"cache-{number}-{boot}",
        "cache",
        f"127.0.0.1:{7000 + 10 * number + boot}",
        state=ServiceState.READY,
        uptime_s=uptime_s,
        store_id=f"store-{number}" if store else "",
    )


class Clients:
    def __init__(self, channels: ChannelPool) -> None:
        self.now = 0.0
        self.view = ClusterView()
        self.access = CacheAccess(lambda: self.view, rpc_caches(channels), lambda: self.now)

    def know(self, *statuses: ServiceStatus) -> None:
        self.view = ClusterView()
        for each in statuses:
            self.view = self.view.announced(Announcement(each, 3.0), self.now)

    def addresses(self) -> list[str | None]:
        peers = [self.access.replica(key) for key in KEYS]
        return [peer.address if peer else None for peer in peers]


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    channels = ChannelPool(max_message_bytes=1 << 20, inject=dict)
    yield Clients(channels)
    await channels.close()


async def test_nobody_is_asked_where_there_is_none(clients: Clients) -> None:
    assert clients.access.replica(b"key") is None
    assert clients.access.all() == []


async def test_lost_replica_takes_its_own_share_only(clients: Clients) -> None:
    clients.know(status(1), status(2), status(3))
    before = clients.addresses()
    assert set(before) == {"127.0.0.1:7010", "127.0.0.1:7020", "127.0.0.1:7030"}
    clients.know(status(1), status(3))
    for old, new in zip(before, clients.addresses(), strict=True):
        assert new == old or old == "127.0.0.1:7020"


async def test_restarted_replica_finds_its_share_again(clients: Clients) -> None:
    clients.know(status(1), status(2))
    before = clients.addresses()
    clients.know(status(1), status(2, boot=3, uptime_s=0.1), status(2))
    moved = {"127.0.0.1:7020": "127.0.0.1:7023"}
    assert clients.addresses() == [moved.get(address, address) for address in before]


async def test_replicas_without_a_disk_are_told_apart(clients: Clients) -> None:
    clients.know(status(1, store=False), status(2, store=False))
    assert len(set(clients.addresses())) == 2


async def test_failed_replica_is_left_alone_for_a_moment_and_the_others_are_asked(
    clients: Clients,
) -> None:
    clients.know(status(1), status(2))
    before = clients.addresses()
    peer = clients.access.replica(KEYS[0])
    assert peer is not None
    clients.access.failed(peer, NoWorker("gone"))
    expected = [None if address == peer.address else address for address in before]
    assert clients.addresses() == expected
    assert set(expected) - {None}
    clients.now = 5.1
    assert clients.addresses() == before
    assert clients.access.num_failures == 1
