"""The cache service's processes: restarted, killed, several of them."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from baton.core.hashing import block_hashes, root_hash
from baton.core.replicas import owner
from baton.wire.cluster import status_from_pb
from tests.support.eventually import eventually
from tests.support.system import Process, System
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from baton.client import Completion
    from baton.core.hashing import Fingerprint

MODEL = "llama"
BLOCK_SIZE = 16
NUM_TOKENS = 8
PATIENCE_S = 10.0
"""Wait for the cache on a busy machine too."""


class CachingSystem(System):
    """Its cache keeps blocks on disk."""

    def cache_settings(self) -> dict[str, object]:
        return {"disk_path": self.directory / "kv", "disk_bytes": 64 << 20}

    def scheduler_settings(self) -> dict[str, object]:
        return {**super().scheduler_settings(), "cache_timeout_s": PATIENCE_S}

    async def worker(self, role: str, model: str, **settings: object) -> Process:
        patience = {"cache_timeout_s": PATIENCE_S} if role == "prefill" else {}
        return await super().worker(role, model, **{**patience, **settings})


@pytest_asyncio.fixture
async def system(tmp_path: Path) -> AsyncIterator[CachingSystem]:
    models = {MODEL: make_tiny_model(MODEL, tmp_path / "model")}
    async with CachingSystem(tmp_path / "system", models) as running:
        yield running


def prompt_of(seed: int, length: int = 300) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(8, 320) for _ in range(length)]


async def stat(system: System, process: Process, name: str) -> float:
    return float((await system.service_status(process)).stats[name])


async def wait_for_stat(system: System, process: Process, name: str, least: float) -> None:
    async def enough() -> bool:
        return await stat(system, process, name) >= least

    await eventually(enough, timeout_s=15.0, interval_s=0.05)


@pytest.mark.timeout(180)
async def test_killed_cache_serves_prefixes_from_disk_after_its_restart(
    system: CachingSystem,
) -> None:
    (cache,) = [process for process in system.processes if process.role == "cache"]
    prefill, _ = await system.workers(MODEL)
    prompt = prompt_of(1)
    expected = await system.greedy(prompt, NUM_TOKENS, model=MODEL)
    num_blocks = (len(prompt) - 1) // BLOCK_SIZE
    await wait_for_stat(system, cache, "disk_blocks", num_blocks)
    await wait_for_stat(system, cache, "disk_queued_bytes", 0)

    cache.kill()
    await system.retire(prefill)
    cache = system.spawn("cache", **system.cache_settings())
    await system.wait_ready(cache)
    assert await stat(system, cache, "stored_blocks") == 0
    assert await stat(system, cache, "disk_blocks") >= num_blocks
    prefill = await system.worker("prefill", MODEL)
    await system.wait_ready(prefill)
    await system.wait_members(prefill, cache)

    assert await system.greedy(prompt, NUM_TOKENS, model=MODEL) == expected
    assert await stat(system, prefill, "fetched_blocks") == num_blocks
    assert await stat(system, cache, "disk_hits") >= num_blocks
    assert await stat(system, cache, "disk_corrupt") == 0


def chain_root(prompt: list[int], fingerprint: Fingerprint) -> bytes:
    """Hash of a prompt's first block: what its replica is chosen by."""
    return next(block_hashes(root_hash(fingerprint.digest(), ""), prompt, BLOCK_SIZE))


@pytest.mark.timeout(180)
async def test_replicas_share_the_prefixes_and_one_that_dies_loses_its_share_only(
    system: CachingSystem,
) -> None:
    caches = [process for process in system.processes if process.role == "cache"]
    caches.append(system.spawn("cache", **system.cache_settings()))
    await system.wait_ready(caches[1])
    prefill, _ = await system.workers(MODEL)
    await system.wait_members(*caches)
    status = status_from_pb(await system.service_status(prefill))
    stores = {(await system.service_status(cache)).store_id: cache for cache in caches}
    assert len(stores) == 2, "both took the same folder"

    prompts, kept = [], {cache.worker_id: 0 for cache in caches}
    for prompt in (prompt_of(seed, 100) for seed in range(1000)):
        keeper = stores[str(owner(stores, chain_root(prompt, status.fingerprint)))].worker_id
        if kept[keeper] < 3:
            kept[keeper] += 1
            prompts.append(prompt)
    expected = [await system.greedy(prompt, NUM_TOKENS, model=MODEL) for prompt in prompts]
    for cache in caches:
        await wait_for_stat(system, cache, "stored_blocks", kept[cache.worker_id] * 6)
        assert await stat(system, cache, "stored_blocks") == kept[cache.worker_id] * 6

    caches[0].kill()
    await system.retire(prefill)
    prefill = await system.worker("prefill", MODEL)
    await system.wait_ready(prefill)
    await system.wait_members(prefill)
    assert [await system.greedy(prompt, NUM_TOKENS, model=MODEL) for prompt in prompts] == expected
    assert await stat(system, prefill, "fetched_blocks") == kept[caches[1].worker_id] * 6


@pytest.mark.timeout(180)
async def test_kept_answer_and_pin_through_all_services(system: CachingSystem) -> None:
    (cache,) = [process for process in system.processes if process.role == "cache"]
    prefill, decode = await system.workers(MODEL)
    await system.wait_members(cache)
    prompt = prompt_of(5, 100)
    pinned = await system.client.pin_prefix(token_ids=prompt, label="e2e", ttl_s=60.0)
    assert (pinned.num_blocks, pinned.num_stored_blocks) == (6, 0)

    async def ask(**options: object) -> Completion:
        return await system.client.generate(
            token_ids=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0.8,
            seed=7,
            top_logprobs=2,
            return_token_ids=True,
            cache_response=True,
            **options,
        )

    first = await ask()
    await wait_for_stat(system, cache, "answers", 1)
    assert [pin.num_stored_blocks for pin in await system.client.pinned_prefixes()] == [6]
    await system.retire(prefill, decode)
    decode = await system.worker("decode", MODEL, num_blocks=64)
    await system.wait_ready(decode)
    await system.wait_members(decode)
    again = await ask()
    assert again.usage.response_cached
    assert (again.text, again.token_ids, again.logprobs) == (
        first.text, first.token_ids, first.logprobs,
    )  # fmt: skip
    assert "steps" not in (await system.service_status(decode)).stats, "a model ran"
    other = await ask(cache_salt="another tenant")
    assert not other.usage.response_cached
    assert other.token_ids == first.token_ids
    assert await stat(system, decode, "steps") > 0

    # The pin lasts over a restart.
    cache.kill()
    cache = system.spawn("cache", **system.cache_settings())
    await system.wait_ready(cache)
    await system.wait_members(cache)

    async def listed() -> bool:
        return [pin.pin_id for pin in await system.client.pinned_prefixes()] == [pinned.pin_id]

    await eventually(listed, timeout_s=10.0, interval_s=0.1)
    assert await system.client.unpin_prefix(pinned.pin_id)
    assert await system.client.pinned_prefixes() == []
