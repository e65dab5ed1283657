"""Reasons on the wire and back."""

from __future__ import annotations

import grpc
import pytest

from baton.core.errors import (
    RETRY_ELSEWHERE,
    BatonError,
    Cancelled,
    DeadlineExceeded,
    ErrorReason,
    Internal,
    InvalidRequest,
    NoWorker,
    QueueFull,
    WorkerDraining,
    error_for,
)
from baton.wire.errors import (
    CATALOGUE,
    RETRY_AFTER_KEY,
    Retry,
    error_from_rpc,
    public_message,
    rpc_errors,
    trailing_metadata,
)


def _failed(
    code: grpc.StatusCode, details: str = "", metadata: tuple[tuple[str, str], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details
    )


def test_catalogue_is_complete() -> None:
    assert set(CATALOGUE) == set(ErrorReason)
    for reason, spec in CATALOGUE.items():
        assert spec.public_text
        assert 400 <= spec.http_status < 600
        assert spec.code is not grpc.StatusCode.OK
        if spec.retry is Retry.SCHEDULER:
            assert reason in RETRY_ELSEWHERE


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_survives_the_wire(reason: ErrorReason) -> None:
    error = error_for(reason, "what to change", retry_after_s=1.25)
    back = error_from_rpc(
        _failed(CATALOGUE[reason].code, public_message(error), trailing_metadata(error))
    )
    assert type(back) is type(error)
    assert back.retry_after_s == 1.25


def test_internal_messages_stay_inside() -> None:
    assert "secret" not in public_message(Internal("secret path"))
    assert public_message(InvalidRequest("x must be > 0")) == "x must be > 0"
    assert len(public_message(InvalidRequest("x" * 10_000))) <= 1024


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection refused", NoWorker),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "RST_STREAM", WorkerDraining),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", QueueFull),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (104857600 vs. 4194304)",
            InvalidRequest,
        ),
        (grpc.StatusCode.UNKNOWN, "Stream removed", NoWorker),
        (grpc.StatusCode.UNKNOWN, "boom", Internal),
    ],
)
def test_statuses_without_a_reason_are_understood(
    code: grpc.StatusCode, details: str, expected: type[BatonError]
) -> None:
    assert type(error_from_rpc(_failed(code, details))) is expected


@pytest.mark.parametrize("value", ["-1", "x", "", "9" * 40, "١٢"])
def test_nonsense_in_metadata_does_no_harm(value: str) -> None:
    pairs = (("baton-error-reason", "QUEUE_FULL"), (RETRY_AFTER_KEY, value))
    error = error_from_rpc(_failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pairs))
    assert isinstance(error, QueueFull)
    assert error.retry_after_s is None
    unknown = (("baton-error-reason", "NO_SUCH_REASON"),)
    assert isinstance(error_from_rpc(_failed(grpc.StatusCode.UNAVAILABLE, "", unknown)), NoWorker)


def test_rpc_errors_maps_failed_calls_and_nothing_else() -> None:
    with pytest.raises(NoWorker), rpc_errors():
        raise _failed(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(KeyError), rpc_errors():
        raise KeyError
    reason = (("baton-error-reason", "CANCELLED"),)
    with pytest.raises(Cancelled), rpc_errors():
        raise _failed(grpc.StatusCode.CANCELLED, "", reason)
