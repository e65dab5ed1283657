"""Workers that fail, fall silent or die: another attempt, without a lost or repeated token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.core.errors import (
    ErrorReason,
    Internal,
    KvChecksum,
    KvTransferLost,
    NoWorker,
    Stalled,
    WorkerDraining,
)
from baton.v1 import inference_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import FakeDecode, expected_text
from tests.support.scheduler_rig import LOST_WITHIN_S, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


@pytest.mark.parametrize("point", ["queue", "compute", "transfer"])
@pytest.mark.parametrize(
    "error", [None, KvTransferLost("push broke"), KvChecksum("bad sum"), Internal("bug")]
)
async def test_prefill_failure_is_repeated_elsewhere(point: str, error: Exception | None) -> None:
    async with Rig(num_prefill=2, num_decode=2) as rig:
        for prefill in rig.prefills[:1]:
            prefill.fail_at = point
            if error is not None:
                prefill.error = error  # type: ignore[assignment]
        answers = [await rig.ask(), await rig.ask()]
        assert [answer.text for answer in answers] == [expected_text("hello", 8)] * 2
        assert sorted(answer.last.placement.attempts for answer in answers) == [1, 2]
        await eventually(rig.nothing_held, LOST_WITHIN_S)


async def test_stalled_push_is_laid_to_the_prefill_worker(rig: Rig) -> None:
    rig.prefills[0].fail_at = "transfer"
    rig.prefills[0].error = Stalled("no credit")
    rig.decodes[0].push_error = Stalled("the push brought nothing for 10 s")
    answer = await rig.ask(timeout_s=5)
    assert answer.text == expected_text("hello", 8)
    assert answer.last.placement.local_prefill
    assert answer.last.placement.attempts == 2


async def test_only_prefill_worker_dies_and_decode_takes_over(rig: Rig) -> None:
    rig.prefills[0].pauses.hold("compute")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
    await rig.processes["prefill-0"].kill()
    answer = await asking
    assert answer.text == expected_text("hello", 8)
    assert answer.last.placement.local_prefill
    await eventually(lambda: not rig.decodes[0].held, LOST_WITHIN_S)
    assert [stage.stage for stage in answer.last.stages if stage.before_first_token][3] == "retry"


@pytest.mark.parametrize("index", [1, 2, 7])
async def test_decode_failure_mid_stream_loses_and_repeats_nothing(index: int) -> None:
    async with Rig(num_decode=2) as rig:
        for decode in rig.decodes:
            decode.fail_at_index = index
        rig.decodes[1].repeat_tokens = 2
        rig.decodes[0].repeat_tokens = 2
        first = await rig.ask()
        assert first.text == expected_text("hello", 8)
        assert first.last.placement.attempts == 2
        assert [m.token_index for m in first.messages if m.num_tokens] == list(range(8))
        assert first.token_ids() == list(map(ord, first.text))
        assert first.last.usage.completion_tokens == 8
        orders = [*rig.decodes[0].orders, *rig.decodes[1].orders]
        assert {order.num_output_tokens for order in orders} == {0, index}
        await eventually(rig.nothing_held, LOST_WITHIN_S)


async def test_killed_decode_worker_is_replaced_by_another() -> None:
    async with Rig(num_decode=2, placement_policy="round_robin") as rig:
        for decode in rig.decodes:
            decode.pauses.hold("token 4")
        asking = asyncio.create_task(rig.ask())

        def victim() -> int | None:
            reached = [i for i in (0, 1) if "token 4" in rig.decodes[i].pauses.reached]
            return reached[0] if reached else None

        await eventually(lambda: victim() is not None)
        dead = victim()
        await rig.processes[f"decode-{dead}"].kill()
        rig.decodes[1 - (dead or 0)].pauses.let_go("token 4")
        answer = await asking
        assert answer.text == expected_text("hello", 8)
        assert answer.last.placement.decode_worker_id == f"decode-{1 - (dead or 0)}"


async def test_only_decode_worker_dies_and_a_new_one_comes() -> None:
    async with Rig() as rig:
        rig.decodes[0].pauses.hold("token 4")
        asking = asyncio.create_task(rig.ask())
        await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
        await rig.processes["decode-0"].kill()
        fresh = FakeDecode()
        process = await rig.start(fresh)
        rig.members.observe(process.announcement())
        answer = await asking
        assert answer.text == expected_text("hello", 8)
        assert answer.last.placement.decode_worker_id == process.worker_id


async def test_no_attempt_is_spent_on_a_dead_worker_while_another_may_come() -> None:
    async with Rig(max_attempts=2) as rig:
        rig.decodes[0].pauses.hold("token 4")
        asking = asyncio.create_task(rig.ask())
        await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
        await rig.processes["decode-0"].kill()
        await eventually(lambda: rig.members.view().get("decode-0") is None)
        rig.members.observe((await rig.start(FakeDecode())).announcement())
        assert (await asking).text == expected_text("hello", 8)


def _suspects(rig: Rig) -> set[str]:
    return {member.worker_id for member in rig.members.view() if member.suspect_until_s > 0}


@pytest.mark.parametrize("role", ["tokenizer", "prefill", "decode", "embed"])
async def test_who_failed_one_request_is_in_doubt_for_all(role: str) -> None:
    async with Rig(num_tokenizers=2, num_prefill=2, num_decode=2) as rig:
        for tokenizer in rig.tokenizers[: role == "tokenizer"]:
            tokenizer.encode_error = NoWorker("fell over")
        rig.prefills[0].fail_at = {"prefill": "compute", "embed": "embed"}.get(role, "")
        rig.decodes[0].fail_at_index = 3 if role == "decode" else None
        for _ in range(2):  # equals take turns
            if role == "embed":
                inputs = [inference_pb2.EmbedInput(text="x")]
                async for _vector in rig.stub.Embed(inference_pb2.EmbedRequest(inputs=inputs)):
                    pass
            else:
                assert (await rig.ask()).text == expected_text("hello", 8)
        assert _suspects(rig) == {f"{role.replace('embed', 'prefill')}-0"}


async def test_an_answer_that_began_does_not_go_on_with_other_weights() -> None:
    async with Rig(worker_wait_s=0.3) as rig:
        rig.decodes[0].pauses.hold("token 4")
        asking = asyncio.create_task(rig.failure())
        await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
        await rig.replace_weights()
        reason, message = await asking
        assert reason is ErrorReason.KV_LAYOUT_MISMATCH
        assert "compute something else" in message
        assert not rig.decodes[-1].orders
        assert rig.service.snapshot().stats == {}


async def test_an_answer_that_has_not_begun_goes_to_whatever_serves_its_model() -> None:
    async with Rig() as rig:
        rig.prefills[0].pauses.hold("compute")
        asking = asyncio.create_task(rig.ask())
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        worker_id = await rig.replace_weights()
        answer = await asking
        assert answer.text == expected_text("hello", 8)
        assert answer.last.placement.decode_worker_id == worker_id


async def test_attempts_are_bounded() -> None:
    async with Rig(worker_wait_s=0.0, max_attempts=3) as rig:
        rig.decodes[0].refuse = lambda: WorkerDraining("going")
        reason, _ = await rig.failure()
        assert reason is ErrorReason.WORKER_DRAINING
        assert len(rig.decodes[0].orders) == 3
        assert [order.attempt for order in rig.decodes[0].orders] == [1, 2, 3]
        assert rig.metric("baton_retries_total", stage="reserve") == 2


async def test_stalled_decode_worker_is_given_up() -> None:
    async with Rig(num_decode=2, decode_stall_s=0.3) as rig:
        rig.decodes[0].pauses.hold("token 3")
        answers = [await rig.ask() for _ in range(2)]
        assert [answer.text for answer in answers] == [expected_text("hello", 8)] * 2
        assert sum(answer.last.placement.attempts for answer in answers) in {2, 3}
