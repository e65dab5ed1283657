"""A request's states, the one function that changes them, and where its time went.

NEW -> TOKENIZED -> ADMITTED -> RESERVED -> PREFILLING -> TRANSFERRING -> COMMITTED -> DECODING
DECODING -> FINISHED;  RESERVED -> DECODING for a local prefill;  from every live state
-> RELEASING -> {FINISHED, ABORTED, FAILED, ADMITTED (the next attempt)}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import Internal


class RequestStatus(Enum):
    """Where a request is; the value is the name that operators see."""

    NEW = "new"
    TOKENIZED = "tokenized"
    """Waiting for admission."""
    ADMITTED = "admitted"
    RESERVED = "reserved"
    """There is room at the decode worker; the prompt waits at the prefill worker."""
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    """The first token is known; the tail of the prompt's KV may still be on its way."""
    COMMITTED = "committed"
    DECODING = "decoding"
    RELEASING = "releasing"
    """What the attempt held is being let go; then the request ends or is tried again."""
    FINISHED = "finished"
    ABORTED = "aborted"
    """Ended by its caller: cancelled, or out of time."""
    FAILED = "failed"


TERMINAL = frozenset({RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED})
"""Nothing follows these."""

_FORWARD = frozenset({
    (RequestStatus.NEW, RequestStatus.TOKENIZED),
    (RequestStatus.TOKENIZED, RequestStatus.ADMITTED),
    (RequestStatus.ADMITTED, RequestStatus.TOKENIZED),
    (RequestStatus.ADMITTED, RequestStatus.RESERVED),
    (RequestStatus.RESERVED, RequestStatus.PREFILLING),
    (RequestStatus.RESERVED, RequestStatus.DECODING),
    (RequestStatus.PREFILLING, RequestStatus.TRANSFERRING),
    (RequestStatus.TRANSFERRING, RequestStatus.COMMITTED),
    (RequestStatus.COMMITTED, RequestStatus.DECODING),
    (RequestStatus.DECODING, RequestStatus.FINISHED),
})
_LETTING_GO = frozenset(
    (status, RequestStatus.RELEASING)
    for status in RequestStatus
    if status not in TERMINAL and status is not RequestStatus.RELEASING
)
_AFTER_RELEASE = frozenset(
    (RequestStatus.RELEASING, status) for status in (*TERMINAL, RequestStatus.ADMITTED)
)
TRANSITIONS: frozenset[tuple[RequestStatus, RequestStatus]] = (
    _FORWARD | _LETTING_GO | _AFTER_RELEASE
)
"""Every legal change of state."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """When a state was entered, on the owner's monotonic clock."""

    status: RequestStatus
    at_s: float


class RequestState:
    """One request's state and history. Only `transition` changes them."""

    def __init__(self, request_id: str, now: float) -> None:
        self.request_id = request_id
        self.status = RequestStatus.NEW
        self.stamps = [Stamp(RequestStatus.NEW, now)]

    @property
    def attempt(self) -> int:
        """Number of the present admission, from 1."""
        return sum(stamp.status is RequestStatus.ADMITTED for stamp in self.stamps)

    @property
    def is_over(self) -> bool:
        """True once a terminal state was reached."""
        return self.status in TERMINAL

    def transition(self, to: RequestStatus, now: float) -> None:
        """Enters a state.

        Raises:
            Internal: the change is not legal; the state is as it was.
        """
        if (self.status, to) not in TRANSITIONS:
            raise Internal(f"request {self.request_id}: {self.status.value} -> {to.value}")
        self.status = to
        self.stamps.append(Stamp(to, now))

    def end(self, to: RequestStatus, now: float) -> None:
        """Enters a terminal state, through RELEASING where that is the only way.

        Raises:
            Internal: the request has ended already, or `to` is not terminal.
        """
        if to not in TERMINAL or self.is_over:
            raise Internal(f"request {self.request_id}: {self.status.value} cannot end {to.value}")
        if (self.status, to) not in TRANSITIONS:
            self.transition(RequestStatus.RELEASING, now)
        self.transition(to, now)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request's life, measured by the service that ran it."""

    name: str
    start_s: float
    """Since the request's arrival at the scheduler."""
    duration_s: float
    before_first_token: bool = False
    """True on the path to the first token: these durations add up to the server's TTFT."""
    worker_id: str = ""
    num_bytes: int = 0
    """Bytes moved (hand-off only)."""
    num_tokens: int = 0
    idle_s: float = 0.0
    """Part of the duration spent waiting for another stage (a hand-off waits for the prefill)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share of an interval, as reported by the worker that ran it."""

    name: str
    duration_s: float
    num_tokens: int = 0


class StageLog:
    """Stages up to the first token follow one another without gaps on one clock.

    Each mark closes the stage that began where the last one ended, so their durations add up to
    the time to first token exactly, whatever the workers reported.
    """

    def __init__(self, arrived_at_s: float) -> None:
        self.arrived_at_s = arrived_at_s
        self.first_token_at_s: float | None = None
        self.stages: list[Stage] = []
        self._marked_at_s = arrived_at_s

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token's text; None before that."""
        return None if self.first_token_at_s is None else self.first_token_at_s - self.arrived_at_s

    def mark(self, name: str, now: float, *, worker_id: str = "", num_tokens: int = 0) -> None:
        """Ends the present stage. Does nothing after the first token."""
        if self.first_token_at_s is not None:
            return
        self._close(name, now, worker_id, num_tokens)

    def split(self, parts: Sequence[Part], rest: str, now: float, *, worker_id: str = "") -> None:
        """Ends the present interval as the reported parts, and what is left of it as `rest`.

        Parts that together are longer than the interval are shortened, the last ones first.
        """
        if self.first_token_at_s is not None:
            return
        for part in parts:
            end_s = min(now, self._marked_at_s + max(0.0, part.duration_s))
            self._close(part.name, end_s, worker_id, part.num_tokens)
        self._close(rest, now, "", 0)

    def first_token(self, name: str, now: float) -> None:
        """Ends the last stage before the first token; later calls do nothing."""
        if self.first_token_at_s is None:
            self._close(name, now, "", 0)
            self.first_token_at_s = now

    def add(self, stage: Stage) -> None:
        """Adds a stage that is not on the path to the first token."""
        self.stages.append(stage)

    def since_arrival(self, at_s: float) -> float:
        """A clock reading as seconds after the arrival, at least 0."""
        return max(0.0, at_s - self.arrived_at_s)

    def _close(self, name: str, now: float, worker_id: str, num_tokens: int) -> None:
        now = max(now, self._marked_at_s)
        self.stages.append(
            Stage(
                name=name,
                start_s=self._marked_at_s - self.arrived_at_s,
                duration_s=now - self._marked_at_s,
                before_first_token=True,
                worker_id=worker_id,
                num_tokens=num_tokens,
            )
        )
        self._marked_at_s = now
