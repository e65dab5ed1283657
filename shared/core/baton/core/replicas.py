"""Which of several replicas a key belongs to: rendezvous (highest random weight) hashing.

Source: D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM
Transactions on Networking 6(1), 1998. A replica that leaves gives away its own share alone, evenly
to the others; one that joins takes an even share from each. No state, no virtual nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

_WEIGHT_BYTES = 8


def owner(names: Iterable[str], key: bytes) -> str | None:
    """The replica that keeps `key`, or None without replicas, in whatever order `names` are."""
    return max(names, key=lambda name: (_weight(name, key), name), default=None)


def _weight(name: str, key: bytes) -> bytes:
    # The name as the hash's key: no name and key run together as another pair does.
    salted = blake2b(name.encode(), digest_size=32).digest()
    return blake2b(key, key=salted, digest_size=_WEIGHT_BYTES).digest()
