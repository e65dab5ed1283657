"""Tenants of one scheduler, and schedulers of the same workers, stay out of each other's way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from baton.client import AsyncClient, RetryPolicy
from baton.core.admission import MAX_PRIORITY
from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import ErrorReason
from baton.scheduler.settings import CONTROL_RPCS, SchedulerSettings
from baton.v1 import control_pb2, control_pb2_grpc, inference_pb2
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.scheduler_rig import Rig

KEYS = "secret-a1=acme,secret-b1=globex"


def _client(rig: Rig, key: str) -> AsyncClient:
    retry = RetryPolicy(max_attempts=1)
    return AsyncClient(rig.address, timeout_s=10, api_key=key, retry=retry)


async def test_two_tenants_may_use_one_request_id_at_once() -> None:
    async with Rig(api_keys=KEYS) as rig:
        rig.decodes[0].pauses.hold("token 3")
        async with _client(rig, "secret-a1") as acme, _client(rig, "secret-b1") as globex:
            asking = [
                asyncio.create_task(client.generate(prompt, max_tokens=6, request_id="mine"))
                for client, prompt in ((acme, "one"), (globex, "two"))
            ]
            await eventually(lambda: len(rig.decodes[0].held) == 2)
            running = [(await client.requests()).requests for client in (acme, globex)]
            assert [[record.request_id for record in records] for records in running] == [
                ["mine"],
                ["mine"],
            ]
            rig.decodes[0].pauses.let_go("token 3")
            texts = [(await answer).text for answer in asking]
    assert texts == [expected_text("one", 6), expected_text("two", 6)]


async def test_one_tenants_record_does_not_replace_anothers() -> None:
    async with (
        Rig(api_keys=KEYS) as rig,
        _client(rig, "secret-a1") as acme,
        _client(rig, "secret-b1") as globex,
    ):
        await acme.generate("hello", max_tokens=2, request_id="mine")
        await globex.generate("hello", max_tokens=5, request_id="mine")
        records = [await client.request("mine") for client in (acme, globex)]
    assert [record.output_tokens for record in records] == [2, 5]


async def test_workers_never_see_one_id_twice_whatever_callers_choose() -> None:
    async with Rig() as rig:
        for _ in range(2):
            assert (await rig.ask(request_id="mine")).last.request_id == "mine"
            inputs = [inference_pb2.EmbedInput(text="x")]
            request = inference_pb2.EmbedRequest(inputs=inputs, request_id="mine")
            assert [vector.request_id async for vector in rig.stub.Embed(request)] == ["mine"]
    decode_ids = [order.request_id for order in rig.decodes[0].orders]
    prefill_ids = [order.request_id for order in rig.prefills[0].orders]
    assert len(set(decode_ids)) == 2
    assert len(set(prefill_ids)) == 4
    assert all("mine" in request_id for request_id in prefill_ids), "a label for workers' logs"


async def test_a_long_request_id_still_fits_what_workers_take() -> None:
    async with Rig() as rig:
        await rig.ask(request_id="r" * 128)
    assert len(rig.decodes[0].orders[0].request_id) == 128


async def test_each_scheduler_admits_its_share_of_the_places() -> None:
    async with Rig() as rig:
        rates = WorkerRates(max_num_seqs=4)
        rig.members.observe(rig.processes["decode-0"].announcement(rates=rates))
        for worker_id in ("scheduler-0", "scheduler-1"):
            status = ServiceStatus(worker_id, "scheduler", "", state=ServiceState.READY)
            rig.members.observe(Announcement(status, lease_s=60.0))
        rig.prefills[0].pauses.hold("compute")
        asking = [asyncio.create_task(rig.ask()) for _ in range(4)]
        await eventually(lambda: rig.service.snapshot().num_waiting == 2)
        assert rig.service.snapshot().num_running == 2
        rig.prefills[0].pauses.let_go("compute")
        assert {(await answer).text for answer in asking} == {expected_text("hello", 8)}


async def test_a_full_decode_worker_that_keeps_a_request_waiting_is_not_in_doubt() -> None:
    async with Rig(num_decode=2, placement_policy="round_robin", decode_stall_s=0.3) as rig:
        busy = rig.processes["decode-0"].announcement(rates=WorkerRates(max_num_seqs=2))
        status = replace(busy.status, num_requests_running=2, num_requests_waiting=3)
        rig.members.observe(replace(busy, status=status))
        rig.decodes[0].pauses.hold("token 1")
        answers = [await rig.ask() for _ in range(2)]
        assert rig.decodes[0].pauses.reached
        assert {answer.text for answer in answers} == {expected_text("hello", 8)}
        assert {answer.last.placement.decode_worker_id for answer in answers} == {"decode-1"}
        assert not [m.worker_id for m in rig.members.view() if m.suspect_until_s > 0]


@pytest.mark.parametrize("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 2**31 - 1])
async def test_priority_is_bounded(priority: int) -> None:
    async with Rig() as rig:
        reason, message = await rig.failure(priority=priority)
        assert reason is ErrorReason.INVALID_REQUEST
        assert str(priority) in message
        request = inference_pb2.EmbedRequest(
            inputs=[inference_pb2.EmbedInput(text="x")], priority=priority
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Embed(request).read()
        assert error_from_rpc(caught.value).reason is ErrorReason.INVALID_REQUEST
        assert (await rig.ask(priority=MAX_PRIORITY)).text == expected_text("hello", 8)


async def test_a_full_scheduler_says_so_and_still_answers_for_itself() -> None:
    async with Rig(max_concurrent_rpcs=CONTROL_RPCS + 3) as rig:
        rig.prefills[0].pauses.hold("compute")
        asking = [asyncio.create_task(rig.ask()) for _ in range(3)]
        await eventually(lambda: sum(rig.service.snapshot().stats.values()) == 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.ask()
        error = error_from_rpc(caught.value)
        assert error.reason is ErrorReason.QUEUE_FULL
        assert error.retry_after_s is not None
        assert "3 requests are at this scheduler" in error.message
        async with grpc.aio.insecure_channel(rig.address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            status = await stub.GetStatus(control_pb2.GetStatusRequest(), timeout=5)
        assert status.status.role == "scheduler"
        rig.prefills[0].pauses.let_go("compute")
        assert {(await answer).text for answer in asking} == {expected_text("hello", 8)}


async def test_requests_for_vectors_leave_room_for_control_calls_too() -> None:
    async with Rig(max_concurrent_rpcs=CONTROL_RPCS + 3) as rig:
        rig.prefills[0].pauses.hold("embed")
        request = inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text="x")])
        asking = [asyncio.create_task(rig.stub.Embed(request).read()) for _ in range(3)]
        await eventually(lambda: rig.service.snapshot().num_running == 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Embed(request).read()
        assert error_from_rpc(caught.value).reason is ErrorReason.QUEUE_FULL
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.ask()
        assert error_from_rpc(caught.value).reason is ErrorReason.QUEUE_FULL
        rig.prefills[0].pauses.let_go("embed")
        assert [(await answer).index for answer in asking] == [0, 0, 0]
        assert (await rig.ask()).text == expected_text("hello", 8)


def test_by_default_the_queue_fills_before_the_calls_do() -> None:
    settings = SchedulerSettings()
    places = 64 * 64  # sequences of 64 decode workers
    assert settings.max_live_requests >= settings.max_waiting_requests + places
