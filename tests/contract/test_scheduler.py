"""The scheduler between fake workers: every way in which a request can go, and that it lets go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
import pytest

from baton.core.cluster import WorkerRates
from baton.core.errors import (
    ErrorReason,
    Internal,
    KvCacheFull,
    KvChecksum,
    KvTransferLost,
    QueueFull,
    Stalled,
    WorkerDraining,
)
from baton.rpc.errors import error_from_rpc
from baton.v1 import common_pb2, inference_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import FakeDecode, expected_text
from tests.support.scheduler_rig import Answer, Rig

LOST_WITHIN_S = 1.5


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


async def _failure(rig: Rig, **fields: object) -> tuple[ErrorReason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.ask(**fields)  # type: ignore[arg-type]
    error = error_from_rpc(caught.value)
    return error.reason, error.message


def _token_ids(answer: Answer) -> list[int]:
    return [token_id for message in answer.messages for token_id in message.token_ids]


async def test_text_comes_from_prefill_then_decode(rig: Rig) -> None:
    answer = await rig.ask("hello")
    assert answer.text == expected_text("hello", 8)
    assert [m.finish_reason for m in answer.messages[:-1]] == [0] * (len(answer.messages) - 1)
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert answer.last.usage.prompt_tokens == 5
    assert answer.last.usage.completion_tokens == 8
    assert answer.messages[0].trace_id == answer.last.trace_id != ""
    assert [m.token_index for m in answer.messages] == list(range(8))
    placement = answer.last.placement
    assert (placement.prefill_worker_id, placement.decode_worker_id) == ("prefill-0", "decode-0")
    assert (placement.attempts, placement.local_prefill) == (1, False)
    await eventually(rig.nothing_held, LOST_WITHIN_S)
    await eventually(lambda: not rig.tokenizers[0].open_outputs)
    assert rig.metric("baton_requests_total", status="ok") == 1


async def test_stages_before_the_first_token_add_up_and_follow_one_another(rig: Rig) -> None:
    answer = await rig.ask()
    stages = list(answer.last.stages)
    path = [stage for stage in stages if stage.before_first_token]
    assert [stage.stage for stage in path] == [
        "tokenize",
        "admit",
        "reserve",
        "queue",
        "prefill",
        "relay",
        "detokenize",
    ]
    ends_ns = 0
    for stage in path:
        assert stage.start.ToNanoseconds() == pytest.approx(ends_ns, abs=2000)
        ends_ns = stage.start.ToNanoseconds() + stage.duration.ToNanoseconds()
    ttft_s = rig.metric("baton_time_to_first_token_seconds_sum")
    assert sum(s.duration.ToNanoseconds() for s in path) / 1e9 == pytest.approx(ttft_s, abs=2e-5)
    handoff = next(stage for stage in stages if stage.stage == "handoff")
    assert (handoff.bytes, handoff.duration.ToMilliseconds()) == (4096, 3)
    assert {"first_decode", "decode"} <= {stage.stage for stage in stages}


async def test_stages_are_returned_only_when_asked_for(rig: Rig) -> None:
    request = rig.request()
    request.explain = False
    messages = [message async for message in rig.stub.Generate(request, timeout=10)]
    assert not messages[-1].stages
    assert not messages[-1].HasField("placement")
    assert messages[-1].HasField("usage")


async def test_stage_spans_hang_under_the_call(rig: Rig) -> None:
    answer = await rig.ask()
    trace_id = int(answer.last.trace_id, 16)

    def spans() -> dict[str, object]:
        found = [s for s in rig.spans.get_finished_spans() if s.context.trace_id == trace_id]
        return {span.name: span for span in found}

    await eventually(lambda: "baton.v1.InferenceService/Generate" in spans())
    root = spans()["baton.v1.InferenceService/Generate"]
    for name in ("tokenize", "admit", "reserve", "prefill", "decode"):
        assert spans()[name].parent.span_id == root.context.span_id  # type: ignore[attr-defined]
    assert spans()["admit"].attributes["baton.decision"] == "disaggregated"  # type: ignore[attr-defined]


async def test_short_prompt_is_computed_by_the_decode_worker() -> None:
    async with Rig(local_prefill_max_tokens=32) as rig:
        answer = await rig.ask("short")
        assert answer.text == expected_text("short", 8)
        assert answer.last.placement.local_prefill
        assert answer.last.placement.reason == "short_suffix"
        assert not rig.prefills[0].orders
        path = [stage.stage for stage in answer.last.stages if stage.before_first_token]
        assert path == ["tokenize", "admit", "reserve", "queue", "prefill", "relay", "detokenize"]
        await eventually(rig.nothing_held, LOST_WITHIN_S)


async def test_without_prefill_workers_the_decode_worker_does_it_all() -> None:
    async with Rig(num_prefill=0) as rig:
        answer = await rig.ask()
        assert answer.text == expected_text("hello", 8)
        assert answer.last.placement.reason == "no_prefill_worker"


async def test_forced_disaggregation_sends_even_one_token_to_prefill() -> None:
    async with Rig(local_prefill_max_tokens=32, force_disaggregation=True) as rig:
        answer = await rig.ask("x")
        assert answer.last.placement.prefill_worker_id == "prefill-0"


async def test_chat_and_token_prompts(rig: Rig) -> None:
    chat = inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role="user", content="hello")]
    )
    answer = await rig.ask("", chat=chat)
    assert answer.text == expected_text("hello", 8)
    tokens = inference_pb2.TokenPrompt(token_ids=map(ord, "hello"))
    answer = await rig.ask("", tokens=tokens)
    assert answer.text == expected_text("hello", 8)


async def test_tools_reach_the_tokenizer(rig: Rig) -> None:
    chat = inference_pb2.ChatPrompt(tools_json="[1]")
    chat.messages.add(role="assistant", content="c", tool_calls_json="[2]", name="n")
    chat.messages.add(role="tool", content="t", tool_call_id="i")
    await rig.ask("", chat=chat)
    assert rig.tokenizers[0].encoded[-1].chat == chat


async def test_a_seed_is_chosen_when_none_is_given(rig: Rig) -> None:
    request = rig.request()
    request.sampling.ClearField("seed")
    for _ in range(2):
        async for _message in rig.stub.Generate(request, timeout=10):
            pass
    seeds = [order.sampling.seed for order in rig.decodes[0].orders]
    assert len(set(seeds)) == 2
    assert [order.sampling.seed for order in rig.prefills[0].orders] == seeds


async def test_max_tokens_is_what_the_context_leaves(rig: Rig) -> None:
    request = rig.request("x" * 502)
    request.sampling.ClearField("max_tokens")
    messages = [message async for message in rig.stub.Generate(request, timeout=10)]
    assert messages[-1].usage.completion_tokens == 10


async def test_first_token_may_be_the_last(rig: Rig) -> None:
    rig.prefills[0].finish_reason = common_pb2.FINISH_REASON_STOP
    answer = await rig.ask()
    assert answer.text == expected_text("hello", 1)
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_STOP
    await eventually(rig.nothing_held, LOST_WITHIN_S)
    assert rig.decodes[0].releases == ["finished"]


async def test_stop_string_ends_the_output_everywhere(rig: Rig) -> None:
    whole = expected_text("hello", 30)
    stop = whole[4:6]
    answer = await rig.ask(sampling={"max_tokens": 30, "stop": [stop]})
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_STOP
    assert answer.last.stop_reason == stop
    assert answer.last.usage.completion_tokens == 6
    assert len(_token_ids(answer)) == 6
    assert stop not in answer.text.removesuffix(whole[4])
    await eventually(rig.nothing_held, LOST_WITHIN_S)


@pytest.mark.parametrize("is_local", [True, False])
async def test_prompt_logprobs_come_once_with_token_texts(is_local: bool) -> None:
    async with Rig(num_prefill=0 if is_local else 1) as rig:
        answer = await rig.ask(
            "hello there",
            sampling={"prompt_logprobs": 2, "logprobs": True, "max_tokens": 3, "stop": ["never"]},
        )
        [told] = [message for message in answer.messages if message.prompt_logprobs]
        assert told.num_tokens == 1
        assert told.logprobs
        entries = told.prompt_logprobs
        assert "".join(entry.token for entry in entries) == "ello there"
        assert [entry.logprob for entry in entries] == [-place for place in range(1, 11)]
        assert {tuple(top.token for top in entry.top) for entry in entries} == {("A", "B")}
        plain = await rig.ask("hello there", sampling={"logprobs": True})
        assert not any(message.prompt_logprobs for message in plain.messages)


async def test_logprobs_carry_token_texts(rig: Rig) -> None:
    answer = await rig.ask(sampling={"logprobs": True, "top_logprobs": 2, "max_tokens": 3})
    entries = [entry for message in answer.messages for entry in message.logprobs]
    assert [entry.token for entry in entries] == list(expected_text("hello", 3))
    assert entries[0].logprob == pytest.approx(-0.25)
    assert [(top.token, top.token_bytes) for top in entries[1].top] == [("A", b"A"), ("B", b"B")]


@pytest.mark.parametrize(
    ("fields", "reason", "texts"),
    [
        ({"prompt": ""}, ErrorReason.INVALID_REQUEST, ["empty"]),
        ({"model": "nope"}, ErrorReason.MODEL_NOT_FOUND, ["'nope'", "'demo'"]),
        ({"prompt": "x" * 600}, ErrorReason.PROMPT_TOO_LONG, ["600", "512", "shorten"]),
        ({"sampling": {"max_tokens": 600}}, ErrorReason.PROMPT_TOO_LONG, ["600", "512", "lower"]),
        ({"sampling": {"temperature": -1.0}}, ErrorReason.INVALID_REQUEST, ["temperature"]),
        ({"request_id": "a b"}, ErrorReason.INVALID_REQUEST, ["request_id"]),
    ],
)
async def test_bad_input_is_refused_with_what_to_change(
    rig: Rig, fields: dict[str, object], reason: ErrorReason, texts: Iterable[str]
) -> None:
    got, message = await _failure(rig, **fields)
    assert got is reason
    assert all(text in message for text in texts), message
    assert not rig.decodes[0].orders
    assert (await rig.ask()).text


async def test_a_running_requests_id_cannot_be_taken(rig: Rig) -> None:
    rig.prefills[0].pauses.hold("compute")
    first = asyncio.create_task(rig.ask(request_id="mine"))
    await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
    reason, message = await _failure(rig, request_id="mine")
    assert reason is ErrorReason.INVALID_REQUEST
    assert "'mine'" in message
    rig.prefills[0].pauses.let_go("compute")
    assert (await first).text == expected_text("hello", 8)


async def test_no_decode_worker_says_so() -> None:
    async with Rig(num_decode=0) as rig:
        reason, message = await _failure(rig)
        assert reason is ErrorReason.NO_WORKER
        assert "decode worker" in message


async def test_no_tokenizer_says_so() -> None:
    async with Rig(num_tokenizers=0) as rig:
        reason, message = await _failure(rig)
        assert reason is ErrorReason.NO_WORKER
        assert "tokenizer" in message


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
    reason, _ = await _failure(rig, timeout_s=0.4)
    assert reason is ErrorReason.DEADLINE
    await eventually(rig.nothing_held, LOST_WITHIN_S)
    await eventually(lambda: rig.metric("baton_requests_total", status="deadline") == 1)
    assert rig.service.snapshot().stats == {}


async def test_default_deadline_is_the_setting() -> None:
    async with Rig(request_timeout_s=0.3) as rig:
        rig.decodes[0].pauses.hold("token 3")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _drain(rig.stub.Generate(rig.request()))
        error = error_from_rpc(caught.value)
        assert error.reason is ErrorReason.DEADLINE
        assert "0.3 s" in error.message
        assert "3 tokens" in error.message


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
        assert _token_ids(first) == list(map(ord, first.text))
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


async def test_attempts_are_bounded() -> None:
    async with Rig(worker_wait_s=0.0, max_attempts=3) as rig:
        rig.decodes[0].refuse = lambda: WorkerDraining("going")
        reason, _ = await _failure(rig)
        assert reason is ErrorReason.WORKER_DRAINING
        assert len(rig.decodes[0].orders) == 3
        assert [order.attempt for order in rig.decodes[0].orders] == [1, 2, 3]
        assert rig.metric("baton_retries_total", stage="reserve") == 2


async def test_queue_is_bounded() -> None:
    async with Rig(max_waiting_requests=1) as rig:
        rates = WorkerRates(max_num_seqs=1)
        rig.members.observe(rig.processes["decode-0"].announcement(rates=rates))
        rig.prefills[0].pauses.hold("compute")
        running = asyncio.create_task(rig.ask("one"))
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        waiting = asyncio.create_task(rig.ask("two"))
        await eventually(lambda: rig.service.snapshot().num_waiting == 1)
        reason, message = await _failure(rig)
        assert reason is ErrorReason.QUEUE_FULL
        assert "1 requests wait" in message
        rig.prefills[0].pauses.let_go("compute")
        texts = [(await running).text, (await waiting).text]
        assert texts == [expected_text("one", 8), expected_text("two", 8)]


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
        order = [order.request_id for order in rig.decodes[0].orders]
        assert order == ["one", "three", "two"]


async def test_prefill_queue_full_goes_local(rig: Rig) -> None:
    rig.prefills[0].fail_at = "queue"
    rig.prefills[0].error = QueueFull("busy")
    answer = await rig.ask()
    assert answer.text == expected_text("hello", 8)
    assert answer.last.placement.local_prefill


async def test_leases_are_renewed_while_prefill_takes_long(rig: Rig) -> None:
    rig.decodes[0].lease_s = 0.3
    rig.prefills[0].pauses.hold("compute")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: rig.decodes[0].num_renewals >= 3)
    rig.prefills[0].pauses.let_go("compute")
    assert (await asking).text == expected_text("hello", 8)


async def test_breaking_tokenizer_stream_loses_no_text(rig: Rig) -> None:
    rig.tokenizers[0].break_after_messages = 4
    answer = await rig.ask()
    assert answer.text == expected_text("hello", 8)
    assert rig.tokenizers[0].num_calls == 2


async def test_many_requests_share_one_tokenizer_stream(rig: Rig) -> None:
    prompts = [f"prompt {index}" for index in range(20)]
    answers = await asyncio.gather(*(rig.ask(prompt) for prompt in prompts))
    assert [answer.text for answer in answers] == [expected_text(p, 8) for p in prompts]
    assert rig.tokenizers[0].num_calls == 1
    await eventually(rig.nothing_held, LOST_WITHIN_S)


async def test_stalled_decode_worker_is_given_up() -> None:
    async with Rig(num_decode=2, decode_stall_s=0.3) as rig:
        rig.decodes[0].pauses.hold("token 3")
        answers = [await rig.ask() for _ in range(2)]
        assert [answer.text for answer in answers] == [expected_text("hello", 8)] * 2
        assert sum(answer.last.placement.attempts for answer in answers) in {2, 3}


async def test_drain_lets_running_requests_end_and_refuses_new_ones(rig: Rig) -> None:
    rig.decodes[0].pauses.hold("token 4")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: "token 4" in rig.decodes[0].pauses.reached)
    draining = asyncio.create_task(rig.service.drain(5))
    await asyncio.sleep(0)
    reason, _ = await _failure(rig)
    assert reason is ErrorReason.WORKER_DRAINING
    rig.decodes[0].pauses.let_go("token 4")
    assert (await asking).text == expected_text("hello", 8)
    await draining
    assert rig.nothing_held()


async def test_models_status_tokenize_detokenize(rig: Rig) -> None:
    models = await rig.stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
    assert [(m.model, m.max_model_len_tokens, m.num_decode_workers) for m in models.models] == [
        ("demo", 512, 1)
    ]
    encoded = await rig.stub.Tokenize(inference_pb2.TokenizeRequest(text="ab"), timeout=5)
    assert list(encoded.token_ids) == [97, 98]
    request = inference_pb2.DetokenizeRequest(token_ids=[97, 98])
    assert (await rig.stub.Detokenize(request, timeout=5)).text == "ab"
    rig.prefills[0].pauses.hold("compute")
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
    status = await rig.stub.GetClusterStatus(inference_pb2.GetClusterStatusRequest(), timeout=5)
    assert {service.role for service in status.services} == {"tokenizer", "prefill", "decode"}
    assert dict(status.requests_by_state) == {"prefilling": 1}
    assert not status.bus_connected
    rig.prefills[0].pauses.let_go("compute")
    await asking
