"""A failed call as one of the errors of baton.core.errors."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import grpc

from baton.core.errors import BatonError, ErrorReason, error_for

REASON_KEY = "baton-error-reason"
RETRY_AFTER_KEY = "baton-retry-after-ms"

RETRYABLE = frozenset({
    ErrorReason.QUEUE_FULL,
    ErrorReason.KV_CACHE_FULL,
    ErrorReason.NO_WORKER,
    ErrorReason.WORKER_DRAINING,
})
"""Refusals: nothing was computed yet, and another try may be admitted."""

_LOCAL_CANCELS = frozenset({"Locally cancelled by application!", "Channel closed!"})
_BY_CODE = MappingProxyType({
    grpc.StatusCode.CANCELLED: ErrorReason.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorReason.DEADLINE,
    grpc.StatusCode.INVALID_ARGUMENT: ErrorReason.INVALID_REQUEST,
    grpc.StatusCode.NOT_FOUND: ErrorReason.REQUEST_NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: ErrorReason.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: ErrorReason.FORBIDDEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorReason.QUEUE_FULL,
    grpc.StatusCode.UNIMPLEMENTED: ErrorReason.UNSUPPORTED,
    grpc.StatusCode.UNAVAILABLE: ErrorReason.NO_WORKER,
})
"""For failures that the transport reports by itself, without a reason."""


def error_from(
    code: grpc.StatusCode, details: str, metadata: Iterable[Any], address: str
) -> BatonError:
    """The error that a call's status and trailing metadata stand for."""
    trailing = {key: value for key, value in metadata if isinstance(value, str)}
    name = trailing.get(REASON_KEY, "")
    if name in ErrorReason.__members__:
        retry_after_ms = trailing.get(RETRY_AFTER_KEY, "")
        retry_after_s = int(retry_after_ms) / 1e3 if retry_after_ms.isdecimal() else None
        return error_for(ErrorReason[name], details, retry_after_s=retry_after_s)
    if code is grpc.StatusCode.CANCELLED and details not in _LOCAL_CANCELS:
        # We did not cancel, so the server cut the call off: it is going down.
        return error_for(ErrorReason.WORKER_DRAINING, f"{address} ended the call: {details}")
    if code is grpc.StatusCode.UNKNOWN and "stream removed" in details.lower():
        return error_for(ErrorReason.NO_WORKER, f"{address} went away: {details}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return error_for(ErrorReason.NO_WORKER, f"cannot reach {address}: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return error_for(
            ErrorReason.DEADLINE, "the deadline passed; raise timeout_s to wait longer"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return error_for(
            ErrorReason.INVALID_REQUEST, f"the request is too large to send: {details}"
        )
    return error_for(_BY_CODE.get(code, ErrorReason.INTERNAL), details or code.name)


def error_of_call(call: Any, address: str) -> BatonError:
    """The error of a failed call, whose code, details and metadata `call` has."""
    return error_from(call.code(), call.details() or "", call.trailing_metadata() or (), address)
