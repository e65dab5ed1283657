"""However a request ends, the scheduler lets go of what it held at every worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.core.errors import (
    ErrorReason,
)
from baton.v1 import inference_pb2
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.scheduler_rig import LOST_WITHIN_S, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


CANCEL_POINTS = [
    ("tokenizer", "encode"),
    ("decode", "reserve"),
    ("prefill", "queue"),
    ("prefill", "compute"),
    ("prefill", "transfer"),
    ("decode", "token 1"),
    ("decode", "token 5"),
]


def _pauses(rig: Rig, role: str) -> object:
    return {"tokenizer": rig.tokenizers, "decode": rig.decodes, "prefill": rig.prefills}[role][
        0
    ].pauses


@pytest.mark.parametrize(("role", "point"), CANCEL_POINTS)
async def test_cancel_lets_go_everywhere(rig: Rig, role: str, point: str) -> None:
    pauses = _pauses(rig, role)
    pauses.hold(point)  # type: ignore[attr-defined]
    call = rig.stub.Generate(rig.request(), timeout=20)
    reading = asyncio.create_task(_drain(call))
    await eventually(lambda: point in pauses.reached)  # type: ignore[attr-defined]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(rig.nothing_held, LOST_WITHIN_S)
    await eventually(lambda: rig.metric("baton_requests_total", status="cancelled") == 1)
    await eventually(lambda: not rig.tokenizers[0].open_outputs)
    pauses.let_go(point)  # type: ignore[attr-defined]
    assert (await rig.ask()).text == expected_text("hello", 8)
    assert rig.service.snapshot().stats == {}


async def _drain(call: object) -> None:
    async for _ in call:  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize(("role", "point"), CANCEL_POINTS)
async def test_deadline_lets_go_everywhere(rig: Rig, role: str, point: str) -> None:
    pauses = _pauses(rig, role)
    pauses.hold(point)  # type: ignore[attr-defined]
    reason, _ = await rig.failure(timeout_s=0.4)
    assert reason is ErrorReason.DEADLINE
    await eventually(rig.nothing_held, LOST_WITHIN_S)
    await eventually(lambda: rig.metric("baton_requests_total", status="deadline") == 1)
    assert rig.service.snapshot().stats == {}


async def test_every_worker_is_told_the_deadline(rig: Rig) -> None:
    await rig.ask(timeout_s=4)
    inputs = [inference_pb2.EmbedInput(text="x")]
    await _drain(rig.stub.Embed(inference_pb2.EmbedRequest(inputs=inputs), timeout=4))
    fakes = (rig.tokenizers[0], rig.decodes[0], rig.prefills[0])
    told = {method: left for fake in fakes for method, left in fake.remaining_s.items()}
    assert set(told) == {"Encode", "Reserve", "Decode", "Prefill", "EmbedPrompt"}
    # gRPC rounds up.
    assert {method for method, left in told.items() if left is None or left > 4.5} == set()


async def test_default_deadline_is_the_setting() -> None:
    async with Rig(request_timeout_s=0.3) as rig:
        rig.decodes[0].pauses.hold("token 3")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _drain(rig.stub.Generate(rig.request()))
        error = error_from_rpc(caught.value)
        assert error.reason is ErrorReason.DEADLINE
        assert "0.3 s" in error.message
        assert "3 tokens" in error.message


async def test_leases_are_renewed_while_prefill_takes_long(rig: Rig) -> None:
    rig.decodes[0].lease_s = 0.3
    rig.prefills[0].pauses.hold("compute")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: rig.decodes[0].num_renewals >= 3)
    rig.prefills[0].pauses.let_go("compute")
    assert (await asking).text == expected_text("hello", 8)


async def test_drain_lets_running_requests_end_and_refuses_new_ones(rig: Rig) -> None:
    rig.decodes[0].pauses.hold("token 4")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
    draining = asyncio.create_task(rig.service.drain(5))
    await asyncio.sleep(0)
    reason, _ = await rig.failure()
    assert reason is ErrorReason.WORKER_DRAINING
    rig.decodes[0].pauses.let_go("token 4")
    assert (await asking).text == expected_text("hello", 8)
    await draining
    assert rig.nothing_held()
