"""The latest requests, as far as an operator may see them: times and counts, never their texts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import islice

from baton.core.clock import Clock
from baton.core.errors import RequestNotFound
from baton.scheduler.live import LiveRequest, RequestKey
from baton.wire.inference.records import RequestRecord

MAX_RUNNING = 256
"""Running requests that one list shows."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A record, and what callers do not see of it."""

    record: RequestRecord
    cache_salt: str
    """Tells whose it is."""
    arrived_at_s: float
    """On the scheduler's clock."""


class RecentRequests:
    """The requests that run, and the last `limit` of those that ended."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._running: OrderedDict[RequestKey, LiveRequest] = OrderedDict()
        self._ended: OrderedDict[RequestKey, _Remembered] = OrderedDict()

    def started(self, live: LiveRequest) -> None:
        """A request was accepted."""
        self._running[live.asked.key] = live

    def ended(self, live: LiveRequest, outcome: str) -> None:
        """It ended: nothing of it is kept but its record."""
        self._running.pop(live.asked.key, None)
        if not self._limit:
            return
        self._ended.pop(live.asked.key, None)  # an id may be used again
        self._ended[live.asked.key] = self._entry(live, outcome)
        if len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def latest(self, limit: int = 0, mark: str = "") -> list[RequestRecord]:
        """The requests, the one that arrived last first; at most `limit`, 0 for all.

        Only those whose salts begin with `mark`, and without their tracks.
        """
        running = (
            live
            for live in reversed(self._running.values())
            if live.asked.job.cache_salt.startswith(mark)
        )
        found = [self._entry(live, "") for live in islice(running, MAX_RUNNING)]
        found += [entry for entry in self._ended.values() if entry.cache_salt.startswith(mark)]
        found.sort(key=lambda entry: entry.arrived_at_s, reverse=True)
        chosen = found[:limit] if limit else found
        return [replace(self._aged(entry), tracks=()) for entry in chosen]

    def get(self, request_id: str, mark: str = "") -> RequestRecord:
        """One of them.

        Raises:
            RequestNotFound: it is not remembered, or its salt does not begin with `mark`.
        """
        running = [live for key, live in self._running.items() if key[1] == request_id]
        found = [self._entry(live, "") for live in reversed(running)]
        found += [entry for key, entry in reversed(self._ended.items()) if key[1] == request_id]
        for entry in found:
            if entry.cache_salt.startswith(mark):
                return self._aged(entry)
        raise RequestNotFound(
            f"request {request_id!r} is not among the last {self._limit} that ended here"
        )

    def _aged(self, entry: _Remembered) -> RequestRecord:
        return replace(entry.record, age_s=self._clock.now() - entry.arrived_at_s)

    def _entry(self, live: LiveRequest, outcome: str) -> _Remembered:
        asked, output, stages = live.asked, live.output, live.timeline.stages
        record = RequestRecord(
            request_id=live.request_id,
            trace_id=live.trace_id,
            model=asked.model,
            state=live.state.status.value,
            outcome=outcome,
            age_s=0.0,
            elapsed_s=live.timeline.now_s(),
            ttft_s=stages.ttft_s,
            prompt_tokens=len(asked.prompt_ids),
            output_tokens=len(output.ids),
            draft_tokens=output.draft_tokens,
            accepted_tokens=output.accepted_tokens,
            placement=live.placement,
            stages=tuple(stages.stages),
            tracks=live.timeline.tracks,
        )
        return _Remembered(record, asked.job.cache_salt, stages.arrived_at_s)
