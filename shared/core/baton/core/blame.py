"""Who is to blame for a failed attempt: one table of who said what, in which state of the request.

A worker's complaint is often about the other one: a decode worker reports a push that broke, which
the prefill worker broke; a prefill worker reports a reservation that the decode worker lost. The
wrong answer costs an attempt on a broken worker and keeps others from a healthy one.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import ErrorReason as Reason
from baton.core.request import RequestStatus
from baton.core.roles import Role


class Culprit(Enum):
    """What a failure is blamed on."""

    PREFILL = "prefill"
    """The worker that computes the prompt: the decode worker itself for a local prefill."""
    DECODE = "decode"
    QUEUE = "queue"
    """The decode worker runs other sequences first: it is full, not broken."""
    CALLER = "caller"
    """The caller reads its answer too slowly; another worker would fare no better."""
    DEADLINE = "deadline"
    """The request's time is over."""


class Fact(Enum):
    """What the scheduler knows about a failed call by itself."""

    SILENCE = "silence"
    """The worker said nothing for too long, rather than reporting an error."""
    LATE = "late"
    """The request's deadline has passed."""
    QUEUED = "queued"
    """The worker has sent no token of this attempt, and has more requests than places."""
    PREFILL_LOST = "prefill_lost"
    """The connection to the prefill worker broke during the hand-off."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why one call to a worker failed."""

    said_by: Role
    """PREFILL or DECODE: the worker that was called."""
    reason: Reason
    status: RequestStatus
    """Of the request when the call failed."""
    facts: AbstractSet[Fact] = frozenset()


@dataclass(frozen=True, slots=True)
class BlameRule:
    """One row: every condition that is given must hold."""

    culprit: Culprit
    said_by: AbstractSet[Role]
    reasons: AbstractSet[Reason] = frozenset(Reason)
    statuses: AbstractSet[RequestStatus] = frozenset(RequestStatus)
    facts: AbstractSet[Fact] = frozenset()
    not_facts: AbstractSet[Fact] = frozenset()

    def fits(self, complaint: Complaint) -> bool:
        """True when the row decides this complaint."""
        return (
            complaint.said_by in self.said_by
            and complaint.reason in self.reasons
            and complaint.status in self.statuses
            and self.facts <= complaint.facts
            and not self.not_facts & complaint.facts
        )


_P, _D, _ANY = {Role.PREFILL}, {Role.DECODE}, {Role.PREFILL, Role.DECODE}
_STALLED, _TIMEOUTS = {Reason.STALLED}, {Reason.STALLED, Reason.DEADLINE}
_SILENCE = {Fact.SILENCE}
# A prefill worker says these about the reservation that it pushes into.
_OF_RESERVATION = {Reason.KV_TRANSFER_LOST, Reason.STALE_EPOCH, Reason.REQUEST_NOT_FOUND}
# A decode worker says these about a push, whose other end is the prefill worker.
_OF_PUSH = {Reason.KV_TRANSFER_LOST, Reason.KV_CHECKSUM, Reason.KV_LAYOUT_MISMATCH}
_S = RequestStatus

BLAME_RULES: tuple[BlameRule, ...] = (
    BlameRule(Culprit.DEADLINE, _ANY, _TIMEOUTS, facts={Fact.LATE}),
    # A decode worker that is decoding reports STALLED when its tokens are not read.
    BlameRule(Culprit.CALLER, _D, _STALLED, {_S.DECODING}, not_facts=_SILENCE),
    BlameRule(Culprit.DECODE, _P, _OF_RESERVATION),
    BlameRule(Culprit.PREFILL, _P),
    # ADMITTED: the decode worker was asked for room, and no other worker is involved yet.
    BlameRule(Culprit.DECODE, _D, statuses={_S.ADMITTED}),
    # The decode worker only sees that the push broke; the prefill worker's own call shows why.
    BlameRule(Culprit.PREFILL, _D, facts={Fact.PREFILL_LOST}),
    BlameRule(Culprit.PREFILL, _D, _OF_PUSH),
    # While the KV is on its way, a decode worker reports the push's silence.
    BlameRule(Culprit.PREFILL, _D, _TIMEOUTS, {_S.TRANSFERRING}, not_facts=_SILENCE),
    BlameRule(Culprit.QUEUE, _D, _STALLED, facts={Fact.SILENCE, Fact.QUEUED}),
    BlameRule(Culprit.DECODE, _D),
)
"""The first row that fits decides."""


def blame(complaint: Complaint) -> Culprit:
    """What a failed call is blamed on."""
    return next(rule.culprit for rule in BLAME_RULES if rule.fits(complaint))
