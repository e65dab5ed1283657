"""What one running sequence has to tell its reader, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.core.errors import BatonError, Stalled
from baton.core.output import DecodeTimings, TokenBatch
from baton.engine.events import Tokens

MAX_PENDING_EVENTS = 4096


def merge(events: Sequence[Tokens], timings: DecodeTimings | None) -> TokenBatch:
    """One batch of consecutive events (at least one)."""
    last = events[-1]
    return TokenBatch(
        token_index=events[0].token_index,
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        draft_tokens=sum(event.draft_tokens for event in events),
        accepted_tokens=sum(event.accepted_tokens for event in events),
        timings=timings,
        prompt_logprobs=events[0].prompt_logprobs,
    )


class Outbox:
    """Events between the engine and one reader.

    A slow reader gets the tokens of several steps in one batch; one that reads nothing for
    MAX_PENDING_EVENTS steps has failed. The batch of the other sequences never waits for it.
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
        """Drops what was not read; the reader gets the (first) error."""
        if self._error is None:
            self._error = error
        self._events.clear()
        self._has_news.set()

    async def take(self) -> list[Tokens]:
        """All events so far, once there is one. Raises the error that it was failed with."""
        while True:
            if self._error is not None:
                raise self._error
            if self._events:
                events, self._events = self._events, []
                return events
            self._has_news.clear()
            await self._has_news.wait()
