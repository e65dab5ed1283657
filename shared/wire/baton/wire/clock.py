"""The system's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from baton.core.clock import Clock


class SystemClock:
    """Implements core.clock.Clock on the process's clocks and the running event loop."""

    def now(self) -> float:
        """Seconds on a monotonic clock."""
        return time.monotonic()

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return time.time_ns()

    async def sleep(self, delay_s: float) -> None:
        """Returns after `delay_s`."""
        await asyncio.sleep(delay_s)

    def timeout(self, delay_s: float | None) -> asyncio.Timeout:
        """Ends the block with TimeoutError after `delay_s`."""
        return asyncio.timeout(delay_s)


async def ended_within(clock: Clock, tasks: Collection[asyncio.Task[Any]], limit_s: float) -> bool:
    """Waits until all tasks have ended, at most `limit_s`; they go on when it was too long."""
    try:
        async with clock.timeout(limit_s):
            while running := [task for task in tasks if not task.done()]:
                await asyncio.wait(running)
    except TimeoutError:
        return False
    return True
