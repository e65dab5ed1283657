"""A clock whose time a test sets."""

from __future__ import annotations

from collections.abc import Callable

from baton.wire.clock import SystemClock


class ReadClock(SystemClock):
    """Reads the time from a function; sleeps and limits stay real."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def now(self) -> float:
        """What the function returns."""
        return self._read()
