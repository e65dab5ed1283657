"""Points at which a fake stops."""

from __future__ import annotations

import asyncio


class Pauses:
    """Points at which a fake stops until it is let go; tests see that it got there."""

    def __init__(self) -> None:
        self._wanted: dict[str, asyncio.Event] = {}
        self.reached: set[str] = set()

    def hold(self, point: str) -> None:
        self._wanted[point] = asyncio.Event()

    def let_go(self, point: str) -> None:
        self._wanted.pop(point).set()

    async def at(self, point: str) -> None:
        self.reached.add(point)
        if (event := self._wanted.get(point)) is not None:
            await event.wait()
