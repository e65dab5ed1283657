"""Prefixes fetched within a time limit, from a cache service that does what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from baton.core.hashing import KvLayout
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.prefill.prefix import PrefixSource
from baton.wire.cache import CacheBlock
from baton.wire.clock import SystemClock

LAYOUT = KvLayout.one_group(4, "float32", (1,), (2,))
HASHES = [bytes([index]) * 16 for index in range(6)]
SPEC = SequenceSpec("a", tuple(range(100)), SamplingParams(), 4, prefill_only=True)


class Cache:
    """A cache service that has all blocks, and sends some."""

    def __init__(self, num_sent: int, *, is_stalling: bool) -> None:
        self._num_sent = num_sent
        self._is_stalling = is_stalling
        self.failures: list[object] = []

    def replica(self, _block_hash: bytes) -> Cache:
        return self

    def failed(self, _peer: object, error: object) -> None:
        self.failures.append(error)

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        return len(hashes)

    async def fetch(
        self, hashes: Sequence[bytes], _layout: object, *, timeout_s: float
    ) -> AsyncGenerator[CacheBlock, None]:
        for block_hash in hashes[: self._num_sent]:
            yield CacheBlock(block_hash, LAYOUT, 0, b"content")
        if self._is_stalling:
            await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("num_sent", "is_stalling", "expected"),
    [(9, False, 4), (2, False, 2), (2, True, 2), (0, True, 0)],
)
async def test_blocks_that_come_in_time_count(
    num_sent: int, is_stalling: bool, expected: int
) -> None:
    imported: list[bytes] = []

    def import_blocks(
        hashes: Sequence[bytes], payloads: Sequence[memoryview], parents: Sequence[bytes]
    ) -> int:
        assert parents == HASHES[:2]
        assert len(hashes) == len(payloads)
        imported.extend(hashes)
        return len(hashes)

    engine: Any = SimpleNamespace(
        block_hashes=lambda *_: HASHES,
        match_prefix=lambda *_: 2,
        transfer=SimpleNamespace(import_blocks=import_blocks),
        fingerprint=SimpleNamespace(layout=SimpleNamespace(block_size=16)),
    )
    cache: Any = Cache(num_sent, is_stalling=is_stalling)
    with ThreadPoolExecutor(1) as executor:
        host: Any = SimpleNamespace(engine=engine, cache=cache, write_back=None, copiers=executor)
        source = PrefixSource(host, SystemClock(), timeout_s=0.2)
        assert await source.fetch(SPEC) == source.num_fetched_blocks == expected
    assert imported == HASHES[2 : 2 + expected]
    assert len(cache.failures) == is_stalling
