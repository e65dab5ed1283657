"""Small KV blocks with made-up content."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from baton.cache.store import StoredBlock
from baton.core.eviction import FIRST_LINK, ChainLink
from baton.core.hashing import KvLayout

LAYOUT = KvLayout.one_group(block_size=2, dtype="float32", num_kv_heads=(1, 1), head_dim=(4, 4))


def name(number: int) -> bytes:
    """A block's hash."""
    return number.to_bytes(16, "big")


def payload(number: int, layout: KvLayout = LAYOUT) -> bytes:
    """Content that differs from block to block."""
    return number.to_bytes(8, "big") * (layout.block_bytes // 8)


def make_block(number: int, link: ChainLink = FIRST_LINK, layout: KvLayout = LAYOUT) -> StoredBlock:
    """A block that is whole."""
    data = payload(number, layout)
    return StoredBlock(name(number), layout, xxhash.xxh3_64_intdigest(data), data, link)


def chain(numbers: Sequence[int], layout: KvLayout = LAYOUT) -> list[StoredBlock]:
    """A prefix: each block continues the one before."""
    return [
        make_block(
            number, ChainLink(name(numbers[index - 1]), index) if index else FIRST_LINK, layout
        )
        for index, number in enumerate(numbers)
    ]
