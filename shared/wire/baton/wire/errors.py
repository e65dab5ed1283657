"""Reasons on the wire: one table from reason to gRPC status, HTTP status and retry.

Servicers raise `BatonError`s; `baton.rpc.interceptors` maps them with this table on the way out,
and `error_from_rpc` maps them back on the caller's side, for calls that block and that do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, cast

import grpc

from baton.core.errors import (
    BatonError,
    Cancelled,
    ErrorReason,
    InvalidRequest,
    NoWorker,
    WorkerDraining,
    error_for,
)
from baton.v1 import common_pb2

REASON_KEY = "baton-error-reason"
"""Trailing metadata: name of the ErrorReason."""
RETRY_AFTER_KEY = "baton-retry-after-ms"
"""Trailing metadata: when a retry may succeed, in whole milliseconds."""
MAX_MESSAGE_CHARS = 1024
Metadata = tuple[tuple[str, str], ...]
"""What goes with a call, besides its messages."""


class Retry(Enum):
    """Which process may try a failed call again."""

    NEVER = "never"
    CLIENT = "client"
    """The caller, after the delay given."""
    SCHEDULER = "scheduler"
    """The scheduler, with another worker or another prefill."""
    BOTH = "both"
    """A refusal by one worker: the scheduler with another one, then the caller."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How a reason looks on the wire."""

    code: grpc.StatusCode
    http_status: int
    public_text: str
    """Stands for an error without a message, and always for INTERNAL."""
    retry: Retry = Retry.NEVER


_R = ErrorReason
_C = grpc.StatusCode

CATALOGUE: Mapping[ErrorReason, Spec] = MappingProxyType({
    _R.INVALID_REQUEST: Spec(_C.INVALID_ARGUMENT, 400, "the request has a value that cannot work"),
    _R.PROMPT_TOO_LONG: Spec(
        _C.INVALID_ARGUMENT, 400, "the prompt does not fit the model's context"
    ),
    _R.MODEL_NOT_FOUND: Spec(_C.NOT_FOUND, 404, "no such model is served here"),
    _R.REQUEST_NOT_FOUND: Spec(_C.NOT_FOUND, 404, "no such request: it never was, or it has ended"),
    _R.UNAUTHENTICATED: Spec(_C.UNAUTHENTICATED, 401, "credentials are needed"),
    _R.FORBIDDEN: Spec(_C.PERMISSION_DENIED, 403, "not allowed"),
    _R.QUEUE_FULL: Spec(_C.RESOURCE_EXHAUSTED, 429, "the queue is full", Retry.CLIENT),
    _R.KV_CACHE_FULL: Spec(_C.RESOURCE_EXHAUSTED, 429, "the KV cache is full", Retry.BOTH),
    _R.NO_WORKER: Spec(
        _C.UNAVAILABLE, 503, "no healthy worker can take the request now", Retry.CLIENT
    ),
    _R.WORKER_DRAINING: Spec(_C.UNAVAILABLE, 503, "the worker takes nothing new", Retry.BOTH),
    _R.KV_TRANSFER_LOST: Spec(_C.ABORTED, 503, "the KV transfer was lost", Retry.SCHEDULER),
    _R.STALE_EPOCH: Spec(_C.ABORTED, 503, "the reservation is no longer current", Retry.SCHEDULER),
    _R.KV_LAYOUT_MISMATCH: Spec(
        _C.FAILED_PRECONDITION, 500, "the workers' models or KV layouts differ"
    ),
    _R.KV_CHECKSUM: Spec(_C.DATA_LOSS, 500, "KV arrived damaged", Retry.SCHEDULER),
    _R.DEADLINE: Spec(_C.DEADLINE_EXCEEDED, 504, "the deadline passed"),
    _R.CANCELLED: Spec(_C.CANCELLED, 499, "cancelled by the caller"),
    _R.UNSUPPORTED: Spec(_C.UNIMPLEMENTED, 501, "not supported here"),
    _R.INTERNAL: Spec(_C.INTERNAL, 500, "internal error; the details are in the server's log"),
    _R.STALLED: Spec(_C.ABORTED, 503, "a peer made no progress", Retry.SCHEDULER),
})

RETRYABLE = frozenset(
    reason for reason, spec in CATALOGUE.items() if spec.retry in {Retry.CLIENT, Retry.BOTH}
)
"""Refusals: nothing was computed, and another try of the caller may be admitted."""

# What gRPC says of calls that this process cancelled.
_LOCAL_CANCELS = frozenset({"Locally cancelled by application!", "Channel closed!"})
# What a status means when it comes without a reason: from gRPC itself, or from a foreign server.
_REASON_BY_CODE: Mapping[grpc.StatusCode, ErrorReason] = MappingProxyType({
    _C.INVALID_ARGUMENT: _R.INVALID_REQUEST,
    _C.OUT_OF_RANGE: _R.INVALID_REQUEST,
    _C.NOT_FOUND: _R.REQUEST_NOT_FOUND,
    _C.UNAUTHENTICATED: _R.UNAUTHENTICATED,
    _C.PERMISSION_DENIED: _R.FORBIDDEN,
    _C.RESOURCE_EXHAUSTED: _R.QUEUE_FULL,
    _C.UNAVAILABLE: _R.NO_WORKER,
    _C.DEADLINE_EXCEEDED: _R.DEADLINE,
    _C.UNIMPLEMENTED: _R.UNSUPPORTED,
    _C.ABORTED: _R.KV_TRANSFER_LOST,
    _C.DATA_LOSS: _R.KV_CHECKSUM,
})


def public_message(error: BatonError) -> str:
    """The text of an error that may leave this process."""
    spec = CATALOGUE[error.reason]
    if error.reason is ErrorReason.INTERNAL or not error.message:
        return spec.public_text
    return error.message[:MAX_MESSAGE_CHARS]


def trailing_metadata(error: BatonError) -> Metadata:
    """The trailing metadata of a call that fails with this error."""
    pairs = [(REASON_KEY, error.reason.name)]
    if error.retry_after_s is not None:
        pairs.append((RETRY_AFTER_KEY, str(max(0, round(error.retry_after_s * 1000)))))
    return tuple(pairs)


class FailedCall(Protocol):
    """A call that failed, blocking or not."""

    def code(self) -> grpc.StatusCode:
        """Its status."""
        ...

    def details(self) -> str | None:
        """What the status says in words."""
        ...

    def trailing_metadata(self) -> Any:
        """The peer's metadata."""
        ...


def error_from_rpc(call: FailedCall, address: str = "") -> BatonError:
    """The BatonError for a failed call. Never raises, however malformed the peer's answer.

    Callers outside the cluster pass `address`, and the message names it.
    """
    metadata = _text_metadata(call)
    code, details = call.code(), call.details() or ""
    reason = ErrorReason.__members__.get(metadata.get(REASON_KEY, ""))
    if reason is not None:
        retry_after_s = _retry_after_s(metadata.get(RETRY_AFTER_KEY, ""))
        return error_for(reason, details, retry_after_s=retry_after_s)
    if code is _C.CANCELLED:
        if details in _LOCAL_CANCELS:
            return Cancelled(details)
        # This process did not cancel, so the peer cut the call off: it stops.
        return WorkerDraining(f"{address or 'the peer'} ended the call: {details}")
    if code is _C.RESOURCE_EXHAUSTED and "larger than max" in details:
        what = "the request is too large to send" if address else "message too large"
        return InvalidRequest(f"{what}: {details}")
    if code is _C.UNKNOWN and "stream removed" in details.lower():
        return NoWorker(f"{address} went away: {details}" if address else details)
    return error_for(_REASON_BY_CODE.get(code, _R.INTERNAL), _described(code, details, address))


def _described(code: grpc.StatusCode, details: str, address: str) -> str:
    if not address:
        return details
    if code is _C.UNAVAILABLE:
        return f"cannot reach {address}: {details}"
    if code is _C.DEADLINE_EXCEEDED:
        return "the deadline passed; raise timeout_s to wait longer"
    return details or code.name


def _text_metadata(call: FailedCall) -> dict[str, str]:
    pairs = cast("Iterable[tuple[str, str | bytes]]", call.trailing_metadata() or ())
    return {key: value for key, value in pairs if isinstance(value, str)}


def _retry_after_s(text: str) -> float | None:
    return int(text) / 1000 if text.isascii() and text.isdigit() and len(text) < 12 else None


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Maps what gRPC raises to a BatonError: a failed call, an ended one, a closed channel."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.InvalidStateError as error:
        raise WorkerDraining("the peer ended the call") from error
    except grpc.aio.UsageError as error:
        raise error_for(ErrorReason.NO_WORKER, "the connection to the peer was closed") from error


class CallErrors:
    """A context that turns gRPC errors of the SDK's calls, blocking or not, into BatonErrors."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, grpc.RpcError):
            raise error_from_rpc(cast("FailedCall", error), self._address) from error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                # The call was cancelled, by its stream or by the client's close, not the task.
                raise Cancelled("the stream was cancelled") from error


def reason_to_pb(reason: ErrorReason) -> common_pb2.ErrorReason:
    """The wire's enum value."""
    return cast("common_pb2.ErrorReason", reason.value)


def reason_from_pb(value: int) -> ErrorReason:
    """The reason; INTERNAL if it is missing or unknown here."""
    try:
        return ErrorReason(value)
    except ValueError:
        return ErrorReason.INTERNAL
