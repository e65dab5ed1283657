"""The scheduler between fake workers: the way of a request, and what is refused before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from baton.core.errors import (
    ErrorReason,
)
from baton.core.hashing import block_hashes, root_hash
from baton.v1 import common_pb2, inference_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import FINGERPRINT, expected_text
from tests.support.scheduler_rig import LOST_WITHIN_S, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


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


async def test_a_prompt_goes_to_the_worker_that_has_its_prefix_under_its_salt() -> None:
    prompt = "0123456789abcdef" * 4
    root = root_hash(FINGERPRINT.digest(), "salt")
    cached = list(block_hashes(root, [ord(letter) for letter in prompt], 16))
    async with Rig(num_decode=3, placement_policy="prefix_aware") as rig:
        rig.service._prefixes.index.load_snapshot("decode-1", 1, cached)

        async def homes(cache_salt: str) -> set[str]:
            answers = [await rig.ask(prompt, cache_salt=cache_salt) for _ in range(3)]
            return {answer.last.placement.decode_worker_id for answer in answers}

        assert await homes("salt") == {"decode-1"}
        assert len(await homes("another")) == 3


async def test_what_this_scheduler_placed_counts_before_workers_announce_it() -> None:
    async with Rig(num_decode=3, placement_policy="least_loaded") as rig:
        for decode in rig.decodes:
            decode.pauses.hold("token 4")
        asking = asyncio.create_task(rig.ask())
        await eventually(lambda: any("token 4" in d.pauses.reached for d in rig.decodes))
        busy = next(d for d in rig.decodes if "token 4" in d.pauses.reached)
        for _ in range(6):
            await rig.ask(sampling={"max_tokens": 2})
        assert len(busy.orders) == 1
        busy.pauses.let_go("token 4")
        await asking


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
    got, message = await rig.failure(**fields)
    assert got is reason
    assert all(text in message for text in texts), message
    assert not rig.decodes[0].orders
    assert (await rig.ask()).text


async def test_a_running_requests_id_cannot_be_taken(rig: Rig) -> None:
    rig.prefills[0].pauses.hold("compute")
    first = asyncio.create_task(rig.ask(request_id="mine"))
    await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
    reason, message = await rig.failure(request_id="mine")
    assert reason is ErrorReason.INVALID_REQUEST
    assert "'mine'" in message
    rig.prefills[0].pauses.let_go("compute")
    assert (await first).text == expected_text("hello", 8)


async def test_no_decode_worker_says_so() -> None:
    async with Rig(num_decode=0) as rig:
        reason, message = await rig.failure()
        assert reason is ErrorReason.NO_WORKER
        assert "decode worker" in message


async def test_no_tokenizer_says_so() -> None:
    async with Rig(num_tokenizers=0) as rig:
        reason, message = await rig.failure()
        assert reason is ErrorReason.NO_WORKER
        assert "tokenizer" in message


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
