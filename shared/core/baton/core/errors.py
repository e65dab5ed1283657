"""Every way in which a request or a call can fail: one class per reason.

Nothing here knows gRPC or HTTP; `baton.wire.errors` and the gateway map reasons to statuses. A
message is meant for the caller: it names the value and says what to change. It never holds prompt
or output text.

    BatonError
    ├── InvalidRequest, PromptTooLong, ModelNotFound, RequestNotFound   the caller's mistake
    ├── Unauthenticated, Forbidden
    ├── QueueFull, KvCacheFull, NoWorker, WorkerDraining                no room now
    ├── KvTransferLost, StaleEpoch, KvLayoutMismatch, KvChecksum,
    │   Stalled                                                         the hand-off failed
    ├── DeadlineExceeded, Cancelled
    └── Unsupported, Internal
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class ErrorReason(Enum):
    """Mirrors baton.v1.ErrorReason, name for name and number for number (a test compares them)."""

    INVALID_REQUEST = 1
    PROMPT_TOO_LONG = 2
    MODEL_NOT_FOUND = 3
    REQUEST_NOT_FOUND = 4
    UNAUTHENTICATED = 5
    FORBIDDEN = 6
    QUEUE_FULL = 7
    KV_CACHE_FULL = 8
    NO_WORKER = 9
    WORKER_DRAINING = 10
    KV_TRANSFER_LOST = 11
    STALE_EPOCH = 12
    KV_LAYOUT_MISMATCH = 13
    KV_CHECKSUM = 14
    DEADLINE = 15
    CANCELLED = 16
    UNSUPPORTED = 17
    INTERNAL = 18
    STALLED = 19


class BatonError(Exception):
    """Base of all errors that have a reason. Raise a subclass."""

    reason: ClassVar[ErrorReason] = ErrorReason.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        """When a retry may succeed, for errors that say "no room now"."""


class InvalidRequest(BatonError):
    """A field has a value that can never work."""

    reason = ErrorReason.INVALID_REQUEST


class PromptTooLong(BatonError):
    """The prompt and the tokens asked for do not fit the model's context."""

    reason = ErrorReason.PROMPT_TOO_LONG


class ModelNotFound(BatonError):
    """No service here serves the model asked for."""

    reason = ErrorReason.MODEL_NOT_FOUND


class RequestNotFound(BatonError):
    """The request, reservation or lease is not known: it never was, or it has ended."""

    reason = ErrorReason.REQUEST_NOT_FOUND


class Unauthenticated(BatonError):
    """No credentials, or wrong ones."""

    reason = ErrorReason.UNAUTHENTICATED


class Forbidden(BatonError):
    """Good credentials without the right to do this."""

    reason = ErrorReason.FORBIDDEN


class QueueFull(BatonError):
    """A bounded queue is full."""

    reason = ErrorReason.QUEUE_FULL


class KvCacheFull(BatonError):
    """This worker has no KV blocks left for the request; another one may."""

    reason = ErrorReason.KV_CACHE_FULL


class NoWorker(BatonError):
    """No healthy worker can take the request now."""

    reason = ErrorReason.NO_WORKER


class WorkerDraining(BatonError):
    """The worker takes nothing new."""

    reason = ErrorReason.WORKER_DRAINING


class KvTransferLost(BatonError):
    """The KV transfer ended before its commit."""

    reason = ErrorReason.KV_TRANSFER_LOST


class StaleEpoch(BatonError):
    """A write carried an epoch that is no longer current. It was refused and changed nothing."""

    reason = ErrorReason.STALE_EPOCH


class KvLayoutMismatch(BatonError):
    """Sender and receiver disagree on model, dtype or KV layout; the message shows how."""

    reason = ErrorReason.KV_LAYOUT_MISMATCH


class KvChecksum(BatonError):
    """A checksum did not match, or a chunk was missing, repeated or out of order."""

    reason = ErrorReason.KV_CHECKSUM


class DeadlineExceeded(BatonError):
    """The request's deadline passed."""

    reason = ErrorReason.DEADLINE


class Cancelled(BatonError):
    """The caller went away or cancelled."""

    reason = ErrorReason.CANCELLED


class Unsupported(BatonError):
    """Asked for something that this build or model cannot do."""

    reason = ErrorReason.UNSUPPORTED


class Internal(BatonError):
    """A defect. Only a fixed text goes to the caller."""

    reason = ErrorReason.INTERNAL


class Stalled(BatonError):
    """A peer made no progress for longer than its stage allows."""

    reason = ErrorReason.STALLED


def _by_reason() -> dict[ErrorReason, type[BatonError]]:
    return {cls.reason: cls for cls in BatonError.__subclasses__()}


def error_for(
    reason: ErrorReason, message: str, *, retry_after_s: float | None = None
) -> BatonError:
    """The error of a reason, as read from the wire."""
    return _by_reason()[reason](message, retry_after_s=retry_after_s)


RETRY_ELSEWHERE = frozenset({
    ErrorReason.KV_CACHE_FULL,
    ErrorReason.QUEUE_FULL,
    ErrorReason.NO_WORKER,
    ErrorReason.WORKER_DRAINING,
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.STALE_EPOCH,
    ErrorReason.KV_CHECKSUM,
    ErrorReason.STALLED,
})
"""Reasons after which the scheduler tries again, with another worker where there is one."""
