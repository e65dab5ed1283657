"""A prompt's prefix from the cache service, against computing it again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.handoff.caller import Caller, make_prompt
from benchmarks.handoff.processes import Processes, core_of

_SUFFIX_TOKENS = 16
_CACHE_BYTES = 1 << 30
_STORE_TIMEOUT_S = 60.0
_FETCH_TIMEOUT_S = 10.0
"""Far above the default: how long it takes is what is measured."""


@dataclass(slots=True)
class PrefixFigures:
    """Seconds to the first token, by turns."""

    fetched_s: list[float] = field(default_factory=list)
    computed_s: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """How many times sooner the first token comes."""
        pairs = zip(self.computed_s, self.fetched_s, strict=True)
        return median(computed / fetched for computed, fetched in pairs)


async def measure_prefix(
    model: Path,
    logs: Path,
    num_tokens: int,
    num_rounds: int,
    note: Callable[[str], None],
) -> PrefixFigures:
    """One worker computes prefixes and stores them, another one needs them."""
    rng = random.Random(num_tokens)
    num_blocks = 2 * ((num_tokens + _SUFFIX_TOKENS) // 16 + 8)
    figures = PrefixFigures()
    async with Processes(logs) as processes:
        note("starting a cache service and two prefill workers")
        cache = await processes.start("cache", memory_bytes=_CACHE_BYTES, cores=core_of(1))
        common: dict[str, object] = {
            "model_path": model,
            "num_blocks": num_blocks,
            "cores": core_of(0),
            "static_peers": f"cache={cache}",
            "cache_timeout_s": _FETCH_TIMEOUT_S,
        }
        writer_address, reader_address = await asyncio.gather(
            processes.start("prefill", **common),
            processes.start("prefill", **common, write_back_queue_blocks=0),
        )
        writer = Caller(processes.channels, writer_address)
        reader = Caller(processes.channels, reader_address)
        for index in range(num_rounds + 1):
            prefix = make_prompt(rng, num_tokens)
            await writer.run(prefix + make_prompt(rng, _SUFFIX_TOKENS))
            await _stored(processes, writer_address, (index + 1) * (num_tokens // 16))
            computed = await reader.run(make_prompt(rng, num_tokens + _SUFFIX_TOKENS))
            fetched = await reader.run(prefix + make_prompt(rng, _SUFFIX_TOKENS))
            if fetched.fetched_tokens != num_tokens:
                raise RuntimeError(
                    f"{fetched.fetched_tokens} of {num_tokens} tokens came from the cache service"
                )
            if index:  # the first round connects and warms up
                figures.computed_s.append(computed.first_token_s)
                figures.fetched_s.append(fetched.first_token_s)
                note(
                    f"round {index}: {computed.first_token_s * 1e3:.0f} ms computed, "
                    f"{fetched.first_token_s * 1e3:.0f} ms with the prefix fetched"
                )
    return figures


async def _stored(processes: Processes, address: str, num_blocks: int) -> None:
    """Waits until a worker has written so many blocks to the cache service."""
    async with asyncio.timeout(_STORE_TIMEOUT_S):
        while True:
            announcement = await processes.control.status(address, lease_s=1.0)
            if announcement.status.stats.get("stored_blocks", 0) >= num_blocks:
                return
            await asyncio.sleep(0.05)
