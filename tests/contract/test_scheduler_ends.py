"""Ends that are nobody's crash: slow callers, drains, and a worker that only refused a hand-off."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from baton.core.errors import ErrorReason, StaleEpoch, Stalled
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.scheduler_rig import Rig


async def test_a_caller_that_reads_too_slowly_is_told_and_costs_no_retry() -> None:
    async with Rig(num_decode=2) as rig:
        for decode in rig.decodes:
            decode.fail_at_index = 3
            decode.error = Stalled("the reader of the tokens is 4096 steps behind")
        reason, message = await rig.failure()
        assert reason is ErrorReason.STALLED
        assert "the caller reads too slowly" in message
        assert len([*rig.decodes[0].orders, *rig.decodes[1].orders]) == 1
        await eventually(rig.nothing_held)


async def test_what_a_drain_cuts_off_is_to_be_asked_elsewhere() -> None:
    async with Rig() as rig:
        rig.decodes[0].pauses.hold("token 4")
        asking = asyncio.create_task(rig.ask())
        await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
        await rig.service.drain(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        error = error_from_rpc(caught.value)
        assert error.reason is ErrorReason.WORKER_DRAINING
        assert "its grace is over" in error.message
        assert rig.metric("baton_requests_total", status="worker_draining") == 1
        await eventually(rig.nothing_held)


async def test_nobody_waits_for_a_new_worker_while_one_that_answers_is_there() -> None:
    async with Rig(num_decode=2, worker_wait_s=60.0) as rig:
        prefill = rig.prefills[0]
        prefill.pauses.hold("transfer")
        prefill.fail_at = "transfer"
        prefill.error = StaleEpoch("the reservation ended")
        asking = asyncio.create_task(rig.ask(timeout_s=15))
        await eventually(lambda: "transfer" in prefill.pauses.reached)
        (holder,) = [index for index, decode in enumerate(rig.decodes) if decode.held]
        await rig.processes[f"decode-{1 - holder}"].kill()
        prefill.pauses.let_go("transfer")
        answer = await asking
        assert answer.text == expected_text("hello", 8)
        assert answer.last.placement.decode_worker_id == f"decode-{holder}"
        assert answer.last.placement.attempts == 3
