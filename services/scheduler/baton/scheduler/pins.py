"""Pins of prefixes: from prompts to blocks and replicas."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import InvalidRequest, NoWorker
from baton.core.hashing import block_hashes, root_hash
from baton.rpc.cache_access import CacheAccess
from baton.scheduler.view import ClusterWatch
from baton.wire.inference.pins import PinnedPrefix


@dataclass(frozen=True, slots=True)
class PinTarget:
    """A prompt whose KV the cache keeps."""

    model: str
    token_ids: tuple[int, ...]
    cache_salt: str


class PrefixPins:
    """Asks the replicas of the cache service."""

    def __init__(self, cluster: ClusterWatch, cache: CacheAccess) -> None:
        self._cluster = cluster
        self._cache = cache

    async def pin(self, target: PinTarget, ttl_s: float, label: str) -> PinnedPrefix:
        """Pins a prompt's full blocks.

        Raises:
            InvalidRequest: it fills no block, or a value is out of range.
            KvCacheFull: it does not fit what pins may take.
            NoWorker: the workers' fingerprints are unknown or differ, or there is no cache service.
        """
        fingerprint = self._cluster.fingerprint(target.model)
        if fingerprint is None:
            raise NoWorker(f"no worker of model {target.model!r} is ready, or they differ")
        layout = fingerprint.layout
        root = root_hash(fingerprint.digest(), target.cache_salt)
        hashes = list(block_hashes(root, target.token_ids, layout.block_size))
        if not hashes:
            raise InvalidRequest(
                f"the prefix has {len(target.token_ids)} tokens; it must have at least the"
                f" {layout.block_size} of a block"
            )
        peer = self._cache.replica(hashes[0])
        if peer is None:
            raise NoWorker("no cache service is ready", retry_after_s=1.0)
        return await peer.pin(hashes, layout.block_bytes, ttl_s, label)

    async def unpin(self, pin_id: str) -> bool:
        """Removes a pin, wherever it is; False when there is none."""
        found = [await peer.unpin(pin_id) for peer in self._cache.all()]
        return any(found)

    async def current(self) -> list[PinnedPrefix]:
        """The pins of all replicas."""
        return [pin for peer in self._cache.all() for pin in await peer.pins()]
