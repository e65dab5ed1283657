"""Tokens on their way from the engine to one reader, bounded."""

from __future__ import annotations

import asyncio

from baton.core.errors import BatonError, Stalled
from baton.engine.events import Tokens

MAX_PENDING_EVENTS = 4096


class Outbox:
    """Events between the engine and one reader.

    A slow reader gets the tokens of several steps in one batch. A reader that falls
    MAX_PENDING_EVENTS steps behind fails. Other sequences never wait for it.
    """

    def __init__(self) -> None:
        self._events: list[Tokens] = []
        self._error: BatonError | None = None
        self._has_news = asyncio.Event()

    def put(self, event: Tokens) -> None:
        """Adds an event.

        Raises:
            Stalled: the reader is too far behind.
        """
        if len(self._events) >= MAX_PENDING_EVENTS:
            raise Stalled(
                f"the reader of the tokens is {MAX_PENDING_EVENTS} steps behind: read faster"
            )
        self._events.append(event)
        self._has_news.set()

    def fail(self, error: BatonError) -> None:
        """Drops unread events; the reader gets the first error."""
        if self._error is None:
            self._error = error
        self._events.clear()
        self._has_news.set()

    async def take(self) -> list[Tokens]:
        """All events so far, once there is one. Raises the error given to `fail`."""
        while True:
            if self._error is not None:
                raise self._error
            if self._events:
                events, self._events = self._events, []
                return events
            self._has_news.clear()
            await self._has_news.wait()
