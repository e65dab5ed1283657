"""Time as a value that is passed in, so that a simulation can run the real code in virtual time."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol


class TimeLimit(Protocol):
    """A running time limit."""

    def expired(self) -> bool:
        """True once the limit has ended the block."""
        ...

    def reschedule(self, when: float | None) -> None:
        """Moves the limit to `when`, on the event loop's clock; None takes it away."""
        ...


class Clock(Protocol):
    """One source of time for a process."""

    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch, for timestamps that other machines read."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Returns after `delay_s`."""
        ...

    def timeout(self, delay_s: float | None) -> AbstractAsyncContextManager[TimeLimit]:
        """Ends the block with TimeoutError after `delay_s`; None sets no limit."""
        ...
