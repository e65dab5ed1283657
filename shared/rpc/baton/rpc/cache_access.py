"""The cache service's replicas, as its clients see them: who keeps what, and who gets a pause.

A prefix is kept whole by one replica, chosen by its first block. Chosen per block, it would be
spread over all of them: each look-up would ask every one, and the loss of any would cut every
prefix short at the first block lost. So a replica that dies takes its own share and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import xxhash

from baton.core.cluster import ClusterView, Member
from baton.core.errors import BatonError
from baton.core.replicas import owner
from baton.core.roles import Role
from baton.wire.cache import CacheCaller, RpcCache
from baton.wire.channel import ChannelPool

logger = logging.getLogger(__name__)
_PAUSE_S = 5.0
Connect = Callable[[str], CacheCaller]
"""The caller of the replica at an address."""


def rpc_caches(channels: ChannelPool) -> Connect:
    """Connects to replicas over shared channels."""
    return lambda address: RpcCache(channels, address, xxhash.xxh3_64_intdigest)


class CacheAccess:
    """Finds the replica for a key; one that failed is not asked for 5 s."""

    def __init__(
        self, view: Callable[[], ClusterView], connect: Connect, clock: Callable[[], float]
    ) -> None:
        self._view = view
        self._connect = connect
        self._clock = clock
        self._paused_until_s: dict[str, float] = {}
        """By address."""
        self.num_failures = 0

    def replica(self, key: bytes) -> CacheCaller | None:
        """The replica for a key, if there is one and it has no pause.

        For a prefix, `key` is the hash of its first block.
        """
        replicas = self._replicas()
        name = owner(replicas, key)
        if name is None:
            return None
        address = replicas[name].status.address
        if self._clock() < self._paused_until_s.get(address, 0.0):
            return None
        return self._connect(address)

    def all(self) -> list[CacheCaller]:
        """Every replica."""
        return [self._connect(each.status.address) for each in self._replicas().values()]

    def failed(self, peer: CacheCaller, error: BatonError | TimeoutError) -> None:
        """A call failed."""
        now = self._clock()
        self.num_failures += 1
        self._paused_until_s = {
            address: until_s for address, until_s in self._paused_until_s.items() if until_s > now
        }
        self._paused_until_s[peer.address] = now + _PAUSE_S
        logger.info("cache service gets a pause", extra={"error": str(error)})

    def _replicas(self) -> dict[str, Member]:
        """By the name of their share: their store's id, so that a restart finds its own again."""
        members = self._view().usable(Role.CACHE, self._clock())
        # Right after a restart the process before it may still be listed: the younger one counts.
        members.sort(key=lambda member: -member.status.uptime_s)
        return {member.status.store_id or member.worker_id: member for member in members}
