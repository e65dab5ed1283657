"""Pauses between the calls of a stream; cancelling the stream ends them."""

from __future__ import annotations

import asyncio
import threading


class AsyncPause:
    """For one task. Other tasks of its loop may end it; a wait under way runs to its end."""

    def __init__(self) -> None:
        self.has_ended = False

    def end(self) -> None:
        """Cancels: every wait returns True from now on. Does not wake the one under way."""
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
        """Ends the wait under way, and makes every later one return at once."""
        self._event.set()

    def ended_within(self, delay_s: float) -> bool:
        """Waits; True when `end` was called."""
        return self._event.wait(delay_s)
