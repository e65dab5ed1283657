from __future__ import annotations

import asyncio
import json

import pytest

from baton.client import AsyncClient, Client, Completion, Guide, RetryPolicy
from baton.core.cluster import ServiceState
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    PromptTooLong,
    QueueFull,
    WorkerDraining,
)
from baton.v1 import common_pb2
from tests.support.eventually import eventually
from tests.support.fake_inference import FAST, serve


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (Guide.json_schema({"type": "object"}), common_pb2.Guide(json_schema='{"type": "object"}')),
        (Guide.json_object(), common_pb2.Guide(json_object=True)),
        (Guide.regex("a+"), common_pb2.Guide(regex="a+")),
        (Guide.lark('start: "a"'), common_pb2.Guide(lark='start: "a"')),
        (Guide.choice(["a", "b"]), common_pb2.Guide(choice=common_pb2.Choices(texts=["a", "b"]))),
    ],
)
async def test_guides_reach_the_server(fake, client, guide, expected):
    await client.generate("say", guide=guide)
    [request] = fake.requests
    assert request.sampling.guide == expected


async def test_prompt_logprobs_come_when_asked_for(fake, client):
    answer = await client.generate("say", prompt_logprobs=0)
    assert fake.requests[0].sampling.prompt_logprobs == 0
    assert [(entry.token, entry.logprob) for entry in answer.prompt_logprobs] == [("p", -0.75)]
    assert (await client.generate("say")).prompt_logprobs == ()
    assert not fake.requests[1].sampling.HasField("prompt_logprobs")


async def test_a_guide_that_cannot_be_one_is_refused_here(fake, client):
    with pytest.raises(InvalidRequest, match="guide"):
        await client.generate("say", guide=Guide.choice([]))
    assert not fake.requests


async def test_completion_carries_everything_the_server_said(fake, client):
    answer = await client.generate(
        "say", max_tokens=3, explain=True, return_token_ids=True, top_logprobs=2, request_id="r-9"
    )
    assert answer.text == "Hello wörld!"
    assert answer.token_ids == (100, 101, 102)
    assert answer.finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (7, 4)
    assert answer.request_id == "r-9"
    assert answer.trace_id == "ab" * 16
    assert answer.model == "demo"
    assert [len(entry.top) for entry in answer.logprobs] == [2, 2, 2]
    [stage] = answer.stages
    assert (stage.name, stage.start_s, stage.duration_s) == ("prefill", 0.25, 1.0)
    assert answer.placement is not None
    assert answer.placement.decode_worker_id == "d1"
    assert answer.ttft_s is not None
    assert 0 < answer.ttft_s <= answer.elapsed_s
    assert answer.num_attempts == 1


async def test_a_caller_chooses_drafts_and_whose_prompt_to_share(fake, client):
    await client.generate("x", speculation=True, draft_source="ngram", fork_of="r-1")
    assert fake.requests[0].sampling.speculation
    assert fake.requests[0].sampling.draft_source == common_pb2.DRAFT_SOURCE_NGRAM
    assert fake.requests[0].fork_of == "r-1"
    with pytest.raises(InvalidRequest, match="draft_source must be model or ngram, got 'x'"):
        await client.generate("x", draft_source="x")


async def test_only_given_options_reach_the_wire(fake, client):
    await client.generate("x", temperature=0.0, stop="END", seed=2**64 - 1, logit_bias={3: 1.5})
    sampling = fake.requests[0].sampling
    assert sampling.HasField("temperature")
    assert sampling.temperature == 0.0
    assert not sampling.HasField("top_p")
    assert not sampling.HasField("max_tokens")
    assert not sampling.HasField("speculation")
    assert list(sampling.stop) == ["END"]
    assert sampling.seed == 2**64 - 1
    assert dict(sampling.logit_bias) == {3: 1.5}


async def test_messages_and_token_ids_are_prompts_too(fake, client):
    await client.generate(messages=[{"role": "user", "content": "hi"}])
    await client.generate(token_ids=[1, 2])
    assert fake.requests[0].chat.messages[0].content == "hi"
    assert list(fake.requests[1].tokens.token_ids) == [1, 2]


async def test_chat_is_generate_with_messages(fake, client):
    answer = await client.chat([{"role": "user", "content": "hi"}], max_tokens=3)
    assert answer.text == "Hello wörld!"
    async with client.chat([{"role": "user", "content": "ho"}], stream=True) as stream:
        assert "".join([chunk.text async for chunk in stream]) == "Hello wörld!"
    with Client(fake.address) as blocking:
        chat = [{"role": "user", "content": "hu"}]
        answer = await asyncio.to_thread(blocking.chat, chat, tools=[{"a": 1}])
        assert answer.text == "Hello wörld!"
    assert [request.chat.messages[0].content for request in fake.requests] == ["hi", "ho", "hu"]
    assert fake.requests[0].sampling.max_tokens == 3
    assert fake.requests[2].chat.tools_json == '[{"a": 1}]'


async def test_tools_and_their_calls_go_along(fake, client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f"},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    await client.generate(messages=messages, tools=[tool])
    chat = fake.requests[0].chat
    assert json.loads(chat.tools_json) == [tool]
    assert json.loads(chat.messages[0].tool_calls_json) == [call]
    assert (chat.messages[1].tool_call_id, chat.messages[1].name) == ("1", "f")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "tools": [{}]}, "tools need messages"),
        ({"messages": [{"role": "user", "content": ""}], "tools": [{1}]}, "plain JSON"),
        ({"prompt": "a", "temperature": -1.0}, "temperature"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "timeout_s": 0}, "timeout_s"),
        ({"token_ids": [-1]}, "does not fit"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
    ],
)
async def test_bad_options_fail_before_the_call(fake, client, options, message):
    with pytest.raises(InvalidRequest, match=message):
        await client.generate(**options)
    assert not fake.requests


async def test_refusals_are_retried_before_the_first_message(fake, client):
    fake.before += [QueueFull("full", retry_after_s=0.02), WorkerDraining("draining")]
    answer = await client.generate("x")
    assert answer.text == "Hello wörld!"
    assert answer.num_attempts == 3
    assert answer.ttft_s is not None
    assert answer.ttft_s >= 0.02


async def test_errors_that_cannot_be_mended_are_raised_with_their_class(fake, client):
    fake.before += [ModelNotFound("no model named x"), PromptTooLong("3000 tokens > 2048")]
    with pytest.raises(ModelNotFound, match="no model named x"):
        await client.generate("x")
    with pytest.raises(PromptTooLong, match="2048"):
        await client.generate("x")
    assert len(fake.requests) == 2


async def test_nothing_is_retried_after_the_first_message(fake, client):
    fake.after.append(QueueFull("too late"))
    stream = client.generate("x", stream=True)
    with pytest.raises(QueueFull):
        await _drain(stream)
    assert stream.completion.text == "Hello"
    assert len(fake.requests) == 1


async def test_retry_that_would_miss_the_deadline_is_not_made(fake, client):
    fake.before.append(QueueFull("full", retry_after_s=30.0))
    with pytest.raises(QueueFull) as caught:
        await client.generate("x", timeout_s=1)
    assert caught.value.retry_after_s == 30.0


async def test_unreachable_server_is_no_worker(client):
    async with AsyncClient("127.0.0.1:1", retry=FAST, timeout_s=2) as nobody:
        with pytest.raises(NoWorker, match=r"127\.0\.0\.1:1"):
            await nobody.generate("x")


@pytest.mark.parametrize("num_chars", [5_000_000, 100_000_000])
async def test_request_that_is_too_large_says_so_and_is_not_sent_again(fake, client, num_chars):
    with pytest.raises(InvalidRequest, match="too large"):
        await client.generate("x" * num_chars)
    assert not fake.requests
    assert (await client.generate("x")).num_attempts == 1


async def test_deadline_goes_with_the_call_and_ends_it(fake, client):
    fake.hold = asyncio.Event()
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout_s=0.3)
    assert 0 < fake.remaining_s[0] <= 0.31
    await eventually(lambda: fake.num_running == 0)


async def test_leaving_the_stream_cancels_the_call(fake, client):
    fake.hold = asyncio.Event()
    async with client.generate("x", stream=True) as stream:
        async for chunk in stream:
            if chunk.text:
                break
    await eventually(lambda: fake.num_cancelled == 1)
    assert stream.completion.text == "Hello"
    assert stream.completion.finish_reason == ""


async def test_cancelling_the_task_cancels_the_call(fake, client):
    fake.hold = asyncio.Event()
    task = asyncio.create_task(_collect(client))
    await eventually(lambda: fake.num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: fake.num_cancelled == 1)


async def test_cancel_from_another_task_is_a_cancelled_error(fake, client):
    fake.hold = asyncio.Event()
    stream = await client.generate("x", stream=True)
    task = asyncio.create_task(_drain(stream))
    await eventually(lambda: fake.num_running == 1)
    stream.cancel()
    with pytest.raises(Cancelled):
        await task


async def test_server_that_goes_down_is_no_cancellation(fake, client):
    fake.hold = asyncio.Event()
    blocking = Client(fake.address, timeout_s=10, retry=FAST)
    tasks = [
        asyncio.create_task(_drain(client.generate("x", stream=True))),
        asyncio.create_task(asyncio.to_thread(list, blocking.generate("x", stream=True))),
    ]
    await eventually(lambda: fake.num_running == 2)
    await fake.server.stop(0)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, WorkerDraining | NoWorker)
    blocking.close()


async def test_client_may_be_made_before_there_is_an_event_loop(fake):
    client = await asyncio.to_thread(AsyncClient, fake.address, timeout_s=10)
    assert (await client.generate("x")).text == "Hello wörld!"
    await client.close()


async def test_closing_the_client_ends_its_streams(fake):
    fake.hold = asyncio.Event()
    client = AsyncClient(fake.address, timeout_s=10)
    task = asyncio.create_task(_drain(client.generate("x", stream=True)))
    await eventually(lambda: fake.num_running == 1)
    await client.close()
    with pytest.raises(Cancelled):
        await task


async def test_server_that_comes_up_late_is_reached_within_the_deadline(fake, client):
    await fake.server.stop(0)
    patient = RetryPolicy(max_attempts=1000, max_backoff_s=0.05, budget=1000)
    async with AsyncClient(fake.address, timeout_s=10, retry=patient) as waiting:
        task = asyncio.create_task(_collect(waiting))
        await eventually(lambda: waiting._retrier._budget < 999)
        again, _ = await serve(fake, fake.address)
        answer = await task
        await again.stop(0)
    assert answer.text == "Hello wörld!"
    assert answer.num_attempts > 1


async def test_stream_without_a_finish_reason_is_an_error(fake, client):
    fake.finish = 0
    with pytest.raises(Internal, match="finish reason"):
        await client.generate("x")


async def test_key_and_trace_context_travel_as_metadata(fake):
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    async with AsyncClient(fake.address, api_key="secret", timeout_s=5) as client:
        with provider.get_tracer("test").start_as_current_span("caller") as span:
            await client.generate("x")
        await client.generate("x")
    trace_id = f"{span.get_span_context().trace_id:032x}"
    assert trace_id in fake.metadata[0]["traceparent"]
    assert fake.metadata[0]["authorization"] == "Bearer secret"
    assert "traceparent" not in fake.metadata[1]


async def test_small_calls(fake, client):
    fake.before.append(NoWorker("starting"))
    [model] = await client.models()
    assert (model.name, model.max_model_len_tokens) == ("demo", 2048)
    assert await client.tokenize("ab") == [97, 98]
    assert await client.detokenize([97, 98]) == "ab"
    status = await client.status()
    assert status.bus_connected
    assert status.services[0].kv_blocks == {"free": 9}
    assert status.services[0].state is ServiceState.READY
    assert status.requests_by_state == {"DECODING": 2}


async def test_blocking_client_does_the_same(fake):
    def use() -> list[str]:
        with Client(fake.address, timeout_s=10, retry=FAST) as client:
            answer = client.generate("x", explain=True)
            with client.generate("y", stream=True) as stream:
                texts = [chunk.text for chunk in stream]
            assert stream.completion.text == answer.text
            assert stream.completion.ttft_s is not None
            assert [model.name for model in client.models()] == ["demo"]
            assert client.tokenize("ab") == [97, 98]
            assert client.detokenize([97]) == "a"
            assert client.status().bus_connected
            assert answer.num_attempts == 2
            return texts

    fake.before.append(QueueFull("full", retry_after_s=0.0))
    assert await asyncio.to_thread(use) == ["", "Hello", " wörld", "!", ""]


async def test_blocking_stream_is_cancelled_when_left_and_from_other_threads(fake):
    def leave() -> None:
        with Client(fake.address, timeout_s=10) as client, client.generate("x", stream=True) as s:
            while not next(s).text:
                pass

    def stop(client: Client) -> BatonError | None:
        try:
            for chunk in (stream := client.generate("x", stream=True)):
                if chunk.text:
                    stream.cancel()
        except Cancelled as error:
            return error
        return None

    fake.hold = asyncio.Event()
    await asyncio.to_thread(leave)
    await eventually(lambda: fake.num_cancelled == 1)
    with Client(fake.address, timeout_s=10) as client:
        assert await asyncio.to_thread(stop, client) is not None
    await eventually(lambda: fake.num_cancelled == 2)


async def _collect(client: AsyncClient) -> Completion:
    return await client.generate("x")


async def _drain(stream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12])
@pytest.mark.parametrize("is_blocking", [False, True])
async def test_a_time_limit_beyond_a_year_is_none(fake, client, timeout_s, is_blocking):
    def block() -> str:
        with Client(fake.address) as blocking:
            assert blocking.models(timeout_s=timeout_s)
            return blocking.generate("x", timeout_s=timeout_s).text

    if is_blocking:
        assert await asyncio.to_thread(block) == "Hello wörld!"
    else:
        assert await client.models(timeout_s=timeout_s)
        assert (await client.generate("x", timeout_s=timeout_s)).text == "Hello wörld!"
    assert fake.remaining_s == [None]
