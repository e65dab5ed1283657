"""The table of blame, row by row, and that it has an answer for everything."""

from __future__ import annotations

import itertools

import pytest

from baton.core.blame import BLAME_RULES, Complaint, Culprit, Fact, blame
from baton.core.errors import ErrorReason as E
from baton.core.request import RequestStatus as S
from baton.core.roles import Role

P, D = Role.PREFILL, Role.DECODE
ATTEMPT_STATES = [S.ADMITTED, S.RESERVED, S.PREFILLING, S.TRANSFERRING, S.COMMITTED, S.DECODING]

CASES = [
    # The request's own time.
    (Complaint(D, E.STALLED, S.DECODING, {Fact.SILENCE, Fact.LATE}), Culprit.DEADLINE),
    (Complaint(D, E.DEADLINE, S.ADMITTED, {Fact.LATE}), Culprit.DEADLINE),
    (Complaint(P, E.DEADLINE, S.PREFILLING, {Fact.LATE}), Culprit.DEADLINE),
    (Complaint(D, E.NO_WORKER, S.DECODING, {Fact.LATE}), Culprit.DECODE),
    # The caller.
    (Complaint(D, E.STALLED, S.DECODING), Culprit.CALLER),
    (Complaint(D, E.STALLED, S.DECODING, {Fact.SILENCE}), Culprit.DECODE),
    (Complaint(D, E.STALLED, S.COMMITTED), Culprit.DECODE),
    # What a prefill worker says of the reservation, and of anything else.
    (Complaint(P, E.KV_TRANSFER_LOST, S.TRANSFERRING), Culprit.DECODE),
    (Complaint(P, E.STALE_EPOCH, S.PREFILLING), Culprit.DECODE),
    (Complaint(P, E.REQUEST_NOT_FOUND, S.RESERVED), Culprit.DECODE),
    (Complaint(P, E.NO_WORKER, S.PREFILLING), Culprit.PREFILL),
    (Complaint(P, E.KV_CHECKSUM, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(P, E.STALLED, S.PREFILLING, {Fact.SILENCE}), Culprit.PREFILL),
    (Complaint(P, E.DEADLINE, S.RESERVED), Culprit.PREFILL),
    # A decode worker that is asked for room answers for itself alone.
    (Complaint(D, E.KV_CACHE_FULL, S.ADMITTED), Culprit.DECODE),
    (Complaint(D, E.KV_LAYOUT_MISMATCH, S.ADMITTED), Culprit.DECODE),
    (Complaint(D, E.DEADLINE, S.ADMITTED), Culprit.DECODE),
    # What a decode worker says of a push.
    (Complaint(D, E.KV_TRANSFER_LOST, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(D, E.KV_CHECKSUM, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(D, E.KV_LAYOUT_MISMATCH, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(D, E.STALLED, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(D, E.DEADLINE, S.TRANSFERRING), Culprit.PREFILL),
    (Complaint(D, E.STALLED, S.TRANSFERRING, {Fact.SILENCE}), Culprit.DECODE),
    (Complaint(D, E.INTERNAL, S.TRANSFERRING), Culprit.DECODE),
    (Complaint(D, E.INTERNAL, S.TRANSFERRING, {Fact.PREFILL_LOST}), Culprit.PREFILL),
    # A full worker is not a broken one.
    (Complaint(D, E.STALLED, S.TRANSFERRING, {Fact.SILENCE, Fact.QUEUED}), Culprit.QUEUE),
    (Complaint(D, E.STALLED, S.DECODING, {Fact.SILENCE, Fact.QUEUED}), Culprit.QUEUE),
    (Complaint(D, E.NO_WORKER, S.TRANSFERRING, {Fact.QUEUED}), Culprit.DECODE),
    # Its own failures.
    (Complaint(D, E.NO_WORKER, S.DECODING), Culprit.DECODE),
    (Complaint(D, E.DEADLINE, S.DECODING), Culprit.DECODE),
    (Complaint(D, E.REQUEST_NOT_FOUND, S.RESERVED), Culprit.DECODE),
]


@pytest.mark.parametrize(("complaint", "culprit"), CASES)
def test_row(complaint: Complaint, culprit: Culprit) -> None:
    assert blame(complaint) is culprit


def test_every_row_decides_a_case() -> None:
    decided = [next(r for r in BLAME_RULES if r.fits(complaint)) for complaint, _ in CASES]
    assert [rule for rule in BLAME_RULES if rule not in decided] == []


def test_everything_that_can_be_said_has_an_answer() -> None:
    subsets = [
        {fact for fact in Fact if number >> list(Fact).index(fact) & 1} for number in range(16)
    ]
    for said_by, reason, status in itertools.product((P, D), E, ATTEMPT_STATES):
        for facts in subsets:
            assert blame(Complaint(said_by, reason, status, facts))
