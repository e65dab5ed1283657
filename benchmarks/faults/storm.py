"""Runs hand-offs with a fault each through real processes, and compares what comes out."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from random import Random

from baton.cli.examination import parse_scrape
from baton.client import BatonError, Cancelled, GenerateOptions
from benchmarks.faults.injection import LEASE_S, Injection, draw
from tests.support.eventually import eventually
from tests.support.system import Process, System

MODEL = "tiny"
NUM_PROMPTS = 24
MAX_TOKENS = 24
HOLD_LEASE_S = 5.0
NUM_BLOCKS = 512
_SCRAPE_INTERVAL_S = 0.25
_GRACE_S = 5.0
"""A request that has not ended so long after its deadline hangs."""
_END_MARGIN_S = 5.0
_SHARED_SALT_SHARE = 0.2
_SETTINGS: dict[str, dict[str, object]] = {
    "prefill": {
        "fault": "from_request_id",
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "hold_lease_s": HOLD_LEASE_S,
        "progress_timeout_s": 2 * LEASE_S,
    },
    "decode": {"reservation_lease_s": LEASE_S, "progress_timeout_s": LEASE_S},
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, how to sample, and the tokens that an undisturbed run made of it."""

    token_ids: tuple[int, ...]
    temperature: float
    seed: int
    expected: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one hand-off ended."""

    kind: str
    error: str
    """Reason's name; empty when it finished."""
    is_wrong: bool
    is_hung: bool
    num_attempts: int
    """0 where it is not known, since the request did not finish."""
    elapsed_s: float


@dataclass
class Storm:
    """A system under faults."""

    system: System
    seed: int
    prompts: list[Prompt] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    num_kills: int = 0
    num_crashes: int = 0
    """Workers that died without having been killed here."""
    num_scrapes: int = 0
    num_unbalanced: int = 0
    """Scrapes in which the blocks by state did not add up to the pool."""
    _killing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _transports: Iterator[str] = field(default_factory=lambda: cycle(["shm,grpc", "grpc"]))

    async def start(self, num_workers: int = 2) -> None:
        """Starts workers, and lets each prompt through once while nothing goes wrong."""
        for role in [role for role in _SETTINGS for _ in range(num_workers)]:
            worker = await self._spawn(role)
            await self.system.wait_ready(worker)
            await self.system.wait_members(worker)
        rng = Random(f"prompts {self.seed}")
        for index in range(NUM_PROMPTS):
            token_ids = tuple(rng.randrange(8, 256) for _ in range(rng.randint(150, 400)))
            prompt = Prompt(token_ids, 0.8 if index % 2 else 0.0, rng.getrandbits(32))
            options = _options(prompt, MAX_TOKENS, f"expected-{index}")
            expected = await self.system.client.generate(**options, timeout_s=60.0)
            self.prompts.append(
                Prompt(token_ids, prompt.temperature, prompt.seed, expected.token_ids)
            )

    async def run(
        self, num_handoffs: int, concurrency: int, on_outcome: Callable[[Storm], None]
    ) -> None:
        """Runs the hand-offs, some at a time."""
        indexes = iter(range(num_handoffs))

        async def work() -> None:
            for index in indexes:
                rng = Random(f"{self.seed} {index}")
                self.outcomes.append(await self._hand_off(index, draw(rng), rng))
                on_outcome(self)

        scraping = asyncio.create_task(self._scrape_all_the_time())
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        scraping.cancel()
        await asyncio.gather(scraping, return_exceptions=True)
        self._count_crashes()

    async def held_blocks(self) -> int:
        """Blocks that the workers still hold when every lease must have ended."""
        with suppress(AssertionError):
            await eventually(self._is_clean, max(LEASE_S, HOLD_LEASE_S) + _END_MARGIN_S, 0.1)
        held = await self.system.held_blocks()
        return sum(sum(counts.values()) for counts in held.values())

    async def _scrape_all_the_time(self) -> None:
        """Adds up each worker's blocks as its metrics show them, while everything changes."""
        while True:
            for process in [p for p in self.system.processes if p.role in _SETTINGS]:
                with suppress(OSError):  # it is starting, or was killed
                    self._add_up(await asyncio.to_thread(_scrape, process))
            await asyncio.sleep(_SCRAPE_INTERVAL_S)

    def _add_up(self, counts: Mapping[str, int]) -> None:
        if counts:  # none while the model loads
            self.num_scrapes += 1
            self.num_unbalanced += sum(counts.values()) != NUM_BLOCKS

    async def _is_clean(self) -> bool:
        return not await self.system.held_blocks()

    async def _hand_off(self, index: int, injection: Injection, rng: Random) -> Outcome:
        if not injection.kill_role:
            return await self._request(index, injection, rng)
        async with self._killing:  # one death at a time: there is always somebody left
            killing = asyncio.create_task(self._kill(injection))
            outcome = await self._request(index, injection, rng)
            await killing
            return outcome

    async def _request(self, index: int, injection: Injection, rng: Random) -> Outcome:
        prompt = rng.choice(self.prompts)
        max_tokens = rng.randint(2, MAX_TOKENS)
        # A salt of its own keeps a prompt out of every prefix cache: all its blocks are handed
        # over. The others share, so that damaged blocks would be found by later requests.
        is_shared = rng.random() < _SHARED_SALT_SHARE
        options = _options(prompt, max_tokens, "" if is_shared else f"{self.seed}-{index}")
        request_id = f"h{self.seed}-{index}~{injection.faults}"
        stream = self.system.client.generate(
            **options,
            stream=True,
            explain=True,
            request_id=request_id,
            timeout_s=injection.timeout_s,
        )
        canceller = None
        if injection.cancel_after_s is not None:
            canceller = asyncio.get_running_loop().call_later(
                injection.cancel_after_s, stream.cancel
            )
        token_ids: list[int] = []
        num_attempts, error, is_hung = 0, "", False
        began_at_s = time.monotonic()
        try:
            async with asyncio.timeout(injection.timeout_s + _GRACE_S):
                async for chunk in stream:
                    token_ids.extend(chunk.token_ids)
                    if chunk.placement is not None:
                        num_attempts = chunk.placement.attempts
                    limit = injection.cancel_after_tokens
                    if limit is not None and len(token_ids) >= limit:
                        stream.cancel()
        except Cancelled:
            error = "CANCELLED"
        except BatonError as failure:
            error = failure.reason.name
        except TimeoutError:
            error, is_hung = "HANGS", True
        finally:
            if canceller is not None:
                canceller.cancel()
        expected = list(prompt.expected[:max_tokens])
        is_right = token_ids == (expected[: len(token_ids)] if error else expected)
        elapsed_s = time.monotonic() - began_at_s
        return Outcome(injection.kind, error, not is_right, is_hung, num_attempts, elapsed_s)

    async def _kill(self, injection: Injection) -> None:
        """Kills a worker, a busy one if there is any, and replaces it."""
        await asyncio.sleep(injection.kill_after_s)
        self._count_crashes()
        living = [
            process for process in self.system.processes if process.role == injection.kill_role
        ]
        loads = {id(process): await self._num_held(process) for process in living}
        victim = max(living, key=lambda process: loads[id(process)])
        victim.kill()
        self.system.processes.remove(victim)
        self.num_kills += 1
        replacement = await self._spawn(injection.kill_role)
        await self.system.wait_ready(replacement)
        await self.system.wait_members(replacement)

    async def _num_held(self, process: Process) -> int:
        status = await self.system.service_status(process)
        return sum(
            count for state, count in status.kv_blocks.items() if state not in {"free", "cached"}
        )

    async def _spawn(self, role: str) -> Process:
        settings: dict[str, object] = {"num_blocks": NUM_BLOCKS, **_SETTINGS[role]}
        if role == "prefill":  # both ways for KV that there are on one machine, in turn
            settings["kv_transports"] = next(self._transports)
        return await self.system.worker(role, MODEL, **settings)

    def _count_crashes(self) -> None:
        for process in [p for p in self.system.processes if p.popen.poll() is not None]:
            self.num_crashes += 1
            self.system.processes.remove(process)


def _scrape(process: Process) -> Mapping[str, int]:
    address = json.loads(process.ready_file.read_text())["metrics_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=2.0) as page:
        return parse_scrape(page.read().decode()).kv_blocks


def _options(prompt: Prompt, max_tokens: int, cache_salt: str) -> GenerateOptions:
    return GenerateOptions(
        token_ids=prompt.token_ids,
        max_tokens=max_tokens,
        temperature=prompt.temperature,
        seed=prompt.seed,
        ignore_eos=True,
        return_token_ids=True,
        cache_salt=cache_salt,
    )
