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
    by_reason: ClassVar[dict[ErrorReason, type[BatonError]]] = {}

    def __init_subclass__(cls, *, reason: ErrorReason | None = None) -> None:
        # A class without a reason is a special case of its parent, and has the parent's.
        if reason is not None:
            cls.reason = reason
            cls.by_reason[reason] = cls

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        """When a retry may succeed, for errors that say "no room now"."""


class InvalidRequest(BatonError, reason=ErrorReason.INVALID_REQUEST):
    """A field has a value that can never work."""


class PromptTooLong(BatonError, reason=ErrorReason.PROMPT_TOO_LONG):
    """The prompt and the tokens asked for do not fit the model's context."""


class ModelNotFound(BatonError, reason=ErrorReason.MODEL_NOT_FOUND):
    """No service here serves the model asked for."""


class RequestNotFound(BatonError, reason=ErrorReason.REQUEST_NOT_FOUND):
    """The request, reservation or lease is not known: it never was, or it has ended."""


class Unauthenticated(BatonError, reason=ErrorReason.UNAUTHENTICATED):
    """No credentials, or wrong ones."""


class Forbidden(BatonError, reason=ErrorReason.FORBIDDEN):
    """Good credentials without the right to do this."""


class QueueFull(BatonError, reason=ErrorReason.QUEUE_FULL):
    """A bounded queue is full."""


class KvCacheFull(BatonError, reason=ErrorReason.KV_CACHE_FULL):
    """This worker has no KV blocks left for the request; another one may."""


class NoWorker(BatonError, reason=ErrorReason.NO_WORKER):
    """No healthy worker can take the request now."""


class WorkerDraining(BatonError, reason=ErrorReason.WORKER_DRAINING):
    """The worker takes nothing new."""


class KvTransferLost(BatonError, reason=ErrorReason.KV_TRANSFER_LOST):
    """The KV transfer ended before its commit."""


class StaleEpoch(BatonError, reason=ErrorReason.STALE_EPOCH):
    """A write carried an epoch that is no longer current. It was refused and changed nothing."""


class KvLayoutMismatch(BatonError, reason=ErrorReason.KV_LAYOUT_MISMATCH):
    """Sender and receiver disagree on model, dtype or KV layout; the message shows how."""


class KvChecksum(BatonError, reason=ErrorReason.KV_CHECKSUM):
    """A checksum did not match, or a chunk was missing, repeated or out of order."""


class DeadlineExceeded(BatonError, reason=ErrorReason.DEADLINE):
    """The request's deadline passed."""


class Cancelled(BatonError, reason=ErrorReason.CANCELLED):
    """The caller went away or cancelled."""


class Unsupported(BatonError, reason=ErrorReason.UNSUPPORTED):
    """Asked for something that this build or model cannot do."""


class Internal(BatonError, reason=ErrorReason.INTERNAL):
    """A defect. Only a fixed text goes to the caller."""


class Stalled(BatonError, reason=ErrorReason.STALLED):
    """A peer made no progress for longer than its stage allows."""


def error_for(
    reason: ErrorReason, message: str, *, retry_after_s: float | None = None
) -> BatonError:
    """The error of a reason, as read from the wire."""
    return BatonError.by_reason[reason](message, retry_after_s=retry_after_s)


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
