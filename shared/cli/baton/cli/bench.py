"""`baton bench`: loads a running system, shows how it goes, and sums it up."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from baton.cli.measurement import LatencyTarget, Sample, Tally, percentile, series, summary
from baton.client import AsyncClient, BatonError, GenerateOptions, RetryPolicy

MAX_RUNNING = 1024
"""Requests that an open loop may have under way; more arrivals are counted and not sent."""
_WORDS = ("parse", "merge", "count", "find", "sort", "write", "split", "check", "load", "path")
_REFRESH_PER_S = 4


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send."""

    num_requests: int
    duration_s: float
    """No request starts later."""
    concurrency: int
    rate: float
    """Mean arrivals per second, of a Poisson process; 0 keeps `concurrency` requests running."""
    num_prompt_words: int
    seed: int
    options: GenerateOptions
    target: LatencyTarget
    timeout_s: float

    @property
    def shape(self) -> str:
        """The load in words."""
        if self.rate:
            return f"{self.rate:g} arrivals/s (Poisson)"
        return f"{self.concurrency} at a time"


def bench(address: str, plan: LoadPlan, console: Console, *, as_json: bool) -> int:
    """Runs a plan and prints the figures; the exit status is 1 when no request went well.

    The first Ctrl-C ends the test and sums up what there is.
    """
    tally = Tally()
    started_at_s = time.monotonic()
    screen = Console(stderr=True)
    with Live(console=screen, refresh_per_second=_REFRESH_PER_S, transient=True) as live:

        def show() -> None:
            live.update(_live_table(tally, plan, time.monotonic() - started_at_s))

        try:
            took_s = asyncio.run(_Run(address, plan, tally, show).run())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    document = {"load": plan.shape, **summary(tally, took_s, plan.target)}
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        console.print(_result_table(document))
        console.print(_result_text(tally, document), highlight=False)
    return 0 if tally.samples else 1


class _Run:
    def __init__(
        self, address: str, plan: LoadPlan, tally: Tally, show: Callable[[], None]
    ) -> None:
        self._address = address
        self._plan = plan
        self._tally = tally
        self._show = show
        self._rng = Random(plan.seed)
        self._is_over = asyncio.Event()

    async def run(self) -> float:
        """Sends all requests; returns the seconds that it took."""
        plan = self._plan
        # A refusal is a result here, not something to try again.
        once = RetryPolicy(max_attempts=1)
        async with AsyncClient(self._address, timeout_s=plan.timeout_s, retry=once) as client:
            await client.models()  # the connection's set-up is not measured
            started_at_s = time.monotonic()
            loop = asyncio.get_running_loop()
            loop.call_later(plan.duration_s, self._is_over.set)
            loop.add_signal_handler(signal.SIGINT, self._interrupt, asyncio.current_task())
            screen = asyncio.create_task(self._refresh())
            try:
                async with asyncio.TaskGroup() as group:
                    await self._start(client, group)
            finally:
                screen.cancel()
                loop.remove_signal_handler(signal.SIGINT)
            return time.monotonic() - started_at_s

    async def _start(self, client: AsyncClient, group: asyncio.TaskGroup) -> None:
        if not self._plan.rate:
            for _ in range(self._plan.concurrency):
                group.create_task(self._repeat(client))
            return
        while self._takes_one():
            await self._pause(self._rng.expovariate(self._plan.rate))
            if self._tally.num_running < MAX_RUNNING:
                group.create_task(self._send(client, self._prompt()))
            else:
                self._tally.num_skipped += 1

    async def _repeat(self, client: AsyncClient) -> None:
        while self._takes_one():
            await self._send(client, self._prompt())

    def _takes_one(self) -> bool:
        """Counts one more request; False when there are enough, or time is up."""
        tally = self._tally
        if self._is_over.is_set() or tally.num_started >= self._plan.num_requests:
            return False
        tally.num_started += 1
        return True

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._is_over.wait()

    def _interrupt(self, task: asyncio.Task[object] | None) -> None:
        """The first time: starts nothing more. The second time: does not wait either."""
        if self._is_over.is_set() and task is not None:
            task.cancel()
        self._is_over.set()

    async def _send(self, client: AsyncClient, prompt: str) -> None:
        tally = self._tally
        tally.num_running += 1
        try:
            done = await client.generate(prompt, **self._plan.options)
        except BatonError as error:
            tally.failures[error.reason.name.lower()] += 1
        else:
            usage = done.usage
            ttft_s = done.ttft_s or done.elapsed_s
            tally.samples.append(
                Sample(ttft_s, done.elapsed_s, usage.prompt_tokens, usage.completion_tokens)
            )
        finally:
            tally.num_running -= 1

    async def _refresh(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(1 / _REFRESH_PER_S)

    def _prompt(self) -> str:
        """Python-like text; every prompt begins differently, so no prefix is shared."""
        words = " ".join(self._rng.choice(_WORDS) for _ in range(self._plan.num_prompt_words))
        return f"# {self._rng.getrandbits(32):08x} {words}\ndef {self._rng.choice(_WORDS)}("


def _live_table(tally: Tally, plan: LoadPlan, took_s: float) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("load", plan.shape)
    table.add_row("time", f"{took_s:.0f} s of {plan.duration_s:g} s at most")
    table.add_row(
        "requests",
        f"{len(tally.samples)} done, {tally.num_running} running"
        f" of {plan.num_requests}, {tally.failures.total()} failed",
    )
    if tally.samples:
        recent = tally.samples[-50:]
        for name, values in series(recent).items():
            table.add_row(
                name.upper(),
                f"p50 {percentile(values, 0.5) * 1e3:,.1f} ms"
                f"   p95 {percentile(values, 0.95) * 1e3:,.1f} ms   (last {len(recent)})",
            )
    return table


def _result_table(document: dict[str, Any]) -> Table:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    numbers = [Column(column, justify="right") for column in columns]
    table = Table("", *numbers, box=None, pad_edge=False, header_style="bold")
    for name in ("ttft", "tpot", "e2e"):
        figures = document.get(f"{name}_ms")
        if figures is not None:
            cells = [f"{figures[column]:,.1f}" for column in columns]
            table.add_row(f"{name.upper()}, ms", *cells)
    return table


def _result_text(tally: Tally, document: dict[str, Any]) -> str:
    goodput = document["goodput"]
    failures = ", ".join(f"{count} {name}" for name, count in sorted(tally.failures.items()))
    skipped = f"; not sent: {tally.num_skipped}" if tally.num_skipped else ""
    return "\n".join((
        f"{len(tally.samples)} requests in {document['duration_s']:.1f} s, {document['load']};"
        f" failed: {failures or 'none'}{skipped}",
        f"{document['requests_per_s']:,.2f} requests/s, {document['output_tokens_per_s']:,.1f}"
        f" output tokens/s, {document['prompt_tokens_per_s']:,.1f} prompt tokens/s",
        f"goodput {goodput['requests_per_s']:,.2f} requests/s ({goodput['share']:.0%}): TTFT within"
        f" {goodput['ttft_target_ms']:g} ms and TPOT within {goodput['tpot_target_ms']:g} ms",
    ))
