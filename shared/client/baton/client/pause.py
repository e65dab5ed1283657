"""Waits between the calls of a stream, which a cancellation ends."""

from __future__ import annotations

import asyncio
import threading


class AsyncPause:
    """For one task; the loop's other tasks end it between two waits."""

    def __init__(self) -> None:
        self.has_ended = False

    def end(self) -> None:
        """Cancels: no wait begins from here on."""
        self.has_ended = True

    async def ended_within(self, delay_s: float) -> bool:
        """Waits; True when `end` was called."""
        if delay_s:
            await asyncio.sleep(delay_s)
        return self.has_ended


class Pause:
    """For one thread; `end` wakes it from any other."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def has_ended(self) -> bool:
        """True once `end` was called."""
        return self._event.is_set()

    def end(self) -> None:
        """Cancels: ends a running wait, and no other begins."""
        self._event.set()

    def ended_within(self, delay_s: float) -> bool:
        """Waits; True when `end` was called."""
        return self._event.wait(delay_s)
