"""Full workers and full queues: who waits, who goes elsewhere, who is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.core.cluster import WorkerRates
from baton.core.errors import (
    ErrorReason,
    KvCacheFull,
    QueueFull,
)
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.scheduler_rig import Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


async def test_full_decode_worker_is_passed_over() -> None:
    async with Rig(num_decode=2) as rig:
        rig.decodes[0].refuse = lambda: KvCacheFull("no blocks")
        answers = [await rig.ask() for _ in range(2)]
        assert [answer.text for answer in answers] == [expected_text("hello", 8)] * 2
        assert {answer.last.placement.decode_worker_id for answer in answers} == {"decode-1"}
        assert {answer.last.placement.attempts for answer in answers} == {1}


async def test_request_waits_while_all_decode_workers_are_full(rig: Rig) -> None:
    is_full = True
    rig.decodes[0].refuse = lambda: KvCacheFull("no blocks") if is_full else None
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: rig.service.snapshot().num_waiting == 1)
    await eventually(lambda: len(rig.decodes[0].orders) >= 2)
    assert not asking.done()
    is_full = False
    assert (await asking).text == expected_text("hello", 8)


async def test_full_for_too_long_is_refused_with_a_delay() -> None:
    async with Rig(kv_wait_s=0.3) as rig:
        rig.decodes[0].refuse = lambda: KvCacheFull("no blocks")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.ask()
        error = error_from_rpc(caught.value)
        assert error.reason is ErrorReason.KV_CACHE_FULL
        assert error.retry_after_s is not None
        assert rig.service.snapshot().num_waiting == 0


async def test_queue_is_bounded() -> None:
    async with Rig(max_waiting_requests=1) as rig:
        rates = WorkerRates(max_num_seqs=1)
        rig.members.observe(rig.processes["decode-0"].announcement(rates=rates))
        rig.prefills[0].pauses.hold("compute")
        running = asyncio.create_task(rig.ask("one"))
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        waiting = asyncio.create_task(rig.ask("two"))
        await eventually(lambda: rig.service.snapshot().num_waiting == 1)
        reason, message = await rig.failure()
        assert reason is ErrorReason.QUEUE_FULL
        assert "1 requests wait" in message
        rig.prefills[0].pauses.let_go("compute")
        texts = [(await running).text, (await waiting).text]
        assert texts == [expected_text("one", 8), expected_text("two", 8)]


@pytest.mark.parametrize("ends_by", ["cancel", "deadline", "default deadline"])
async def test_who_leaves_the_queue_takes_nobodys_place(ends_by: str) -> None:
    async with Rig(request_timeout_s=0.3) as rig:
        rates = WorkerRates(max_num_seqs=1)
        rig.members.observe(rig.processes["decode-0"].announcement(rates=rates))
        rig.prefills[0].pauses.hold("compute")
        running = asyncio.create_task(rig.ask("one"))
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        timeout_s = {"cancel": 20, "deadline": 0.3}.get(ends_by)
        leaving = asyncio.create_task(rig.failure("two", timeout_s=timeout_s))
        await eventually(lambda: rig.service.snapshot().num_waiting == 1)
        if ends_by == "cancel":
            leaving.cancel()
        await asyncio.wait({leaving})
        await eventually(lambda: rig.service.snapshot().num_waiting == 0)
        rig.prefills[0].pauses.let_go("compute")
        assert (await running).text == expected_text("one", 8)
        assert (await rig.ask("three")).text == expected_text("three", 8)
        assert len(rig.decodes[0].orders) == 2


async def test_higher_priority_overtakes_in_the_queue() -> None:
    async with Rig() as rig:
        rates = WorkerRates(max_num_seqs=1)
        rig.members.observe(rig.processes["decode-0"].announcement(rates=rates))
        rig.prefills[0].pauses.hold("compute")
        asking = [asyncio.create_task(rig.ask("one", request_id="one"))]
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        for name, priority in (("two", 0), ("three", 5)):
            ask = rig.ask(name, request_id=name, priority=priority)
            asking.append(asyncio.create_task(ask))
            num_waiting = len(asking) - 1
            await eventually(lambda: rig.service.snapshot().num_waiting == num_waiting)  # noqa: B023
        rig.prefills[0].pauses.let_go("compute")
        await asyncio.gather(*asking)
        order = [order.request_id.partition(".")[2] for order in rig.decodes[0].orders]
        assert order == ["one", "three", "two"]


async def test_prefill_queue_full_goes_local(rig: Rig) -> None:
    rig.prefills[0].fail_at = "queue"
    rig.prefills[0].error = QueueFull("busy")
    answer = await rig.ask()
    assert answer.text == expected_text("hello", 8)
    assert answer.last.placement.local_prefill
