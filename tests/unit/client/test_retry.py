"""When a refused call is tried again, and which error a failed one is."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from baton.client import Client, RetryPolicy
from baton.client.retry import Retrier
from baton.core.errors import (
    ErrorReason,
    NoWorker,
    QueueFull,
    error_for,
)
from baton.wire import errors
from tests.support.fake_inference import FAST


def test_budget_bounds_retries_over_all_calls():
    retrier = Retrier(RetryPolicy(budget=2.0), Random(0))
    error = NoWorker("none")
    delays = [retrier.delay_s(error, 1, 60.0) for _ in range(4)]
    assert [delay is None for delay in delays] == [False, False, True, True]
    for _ in range(11):
        retrier.succeeded()
    assert retrier.delay_s(error, 1, 60.0) is not None


def test_delay_honours_retry_after_and_is_jittered():
    retrier = Retrier(RetryPolicy(budget=100), Random(0))
    delays = {retrier.delay_s(QueueFull("full", retry_after_s=2.0), 3, 60.0) for _ in range(8)}
    assert len(delays) == 8
    assert all(2.0 <= delay <= 2.4 for delay in delays if delay is not None)


@pytest.mark.parametrize("call", ["generate", "embed"])
@pytest.mark.parametrize("is_blocking", [False, True])
async def test_a_further_attempt_has_what_is_left_of_the_time(fake, client, call, is_blocking):
    fake.before.append(QueueFull("full", retry_after_s=0.5))

    def block() -> None:
        with Client(fake.address, retry=FAST) as blocking:
            getattr(blocking, call)("x", timeout_s=2.0)

    if is_blocking:
        await asyncio.to_thread(block)
    else:
        await getattr(client, call)("x", timeout_s=2.0)
    first_s, second_s = fake.remaining_s
    assert second_s < first_s - 0.4


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_survives_the_wire(reason):
    import grpc

    metadata = [(errors.REASON_KEY, reason.name), (errors.RETRY_AFTER_KEY, "1500")]
    failed = grpc.aio.AioRpcError(
        grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details="text"
    )
    error = errors.error_from_rpc(failed, "here:1")
    assert type(error) is type(error_for(reason, ""))
    assert (error.message, error.retry_after_s) == ("text", 1.5)
