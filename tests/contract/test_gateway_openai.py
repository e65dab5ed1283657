"""The gateway as OpenAI's own client sees it, over HTTP, with a fake scheduler behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio

from baton.v1 import common_pb2
from tests.support.gateway_rig import Edge, running_gateway


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


async def test_completion(edge):
    answer = await edge.client.completions.create(
        model="demo",
        prompt="say",
        max_tokens=3,
        seed=7,
        stop=["END"],
        temperature=0,
        logit_bias={"5": -100},
        extra_body={"ignore_eos": True, "top_k": 5, "min_tokens": 1, "unheard_of": 1},
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    [request] = edge.fake.requests
    assert request.text == "say"
    assert request.sampling.max_tokens == 3
    assert (request.sampling.seed, list(request.sampling.stop)) == (7, ["END"])
    assert request.sampling.ignore_eos
    assert (request.sampling.top_k, request.sampling.min_tokens) == (5, 1)
    assert dict(request.sampling.logit_bias) == {5: -100.0}
    assert 0 < edge.fake.remaining_s[0] <= 20.2  # gRPC rounds a deadline up to tenths


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, common_pb2.Guide(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            common_pb2.Guide(json_schema=json.dumps(SCHEMA)),
        ),
        ({"guided_json": SCHEMA}, common_pb2.Guide(json_schema=json.dumps(SCHEMA))),
        ({"guided_json": "{}"}, common_pb2.Guide(json_schema="{}")),
        ({"guided_regex": "a+"}, common_pb2.Guide(regex="a+")),
        (
            {"guided_choice": ["ja", "nein"]},
            common_pb2.Guide(choice=common_pb2.Choices(texts=["ja", "nein"])),
        ),
        ({"guided_grammar": 'start: "a"'}, common_pb2.Guide(lark='start: "a"')),
        (
            {"structured_outputs": {"json": SCHEMA}},
            common_pb2.Guide(json_schema=json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json_object": True}}, common_pb2.Guide(json_object=True)),
        ({"structured_outputs": {"regex": "b"}}, common_pb2.Guide(regex="b")),
        (
            {"structured_outputs": {"choice": ["x"]}},
            common_pb2.Guide(choice=common_pb2.Choices(texts=["x"])),
        ),
        ({"structured_outputs": {"grammar": 'start: "b"'}}, common_pb2.Guide(lark='start: "b"')),
    ],
)
async def test_guides_in_everybodys_words(edge, asked, expected):
    await edge.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], extra_body=asked
    )
    await edge.client.completions.create(model="demo", prompt="x", extra_body=asked)
    assert len(edge.fake.requests) == 2
    for request in edge.fake.requests:
        assert request.sampling.HasField("guide") is (expected is not None)
        assert expected is None or request.sampling.guide == expected


async def test_openais_parse_gets_its_model(edge):
    class Pet(pydantic.BaseModel):
        name: str
        age: int

    edge.fake.words = ('{"name": ', '"Rex", ', '"age": 3}')
    answer = await edge.client.chat.completions.parse(
        model="demo", messages=[{"role": "user", "content": "x"}], response_format=Pet
    )
    assert answer.choices[0].message.parsed == Pet(name="Rex", age=3)
    [request] = edge.fake.requests
    schema = json.loads(request.sampling.guide.json_schema)
    assert schema["required"] == ["name", "age"]


async def test_completions_default_to_16_tokens_and_chats_to_the_whole_context(edge):
    await edge.client.completions.create(model="demo", prompt="x")
    await edge.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}]
    )
    assert edge.fake.requests[0].sampling.max_tokens == 16
    assert not edge.fake.requests[1].sampling.HasField("max_tokens")


async def test_chat(edge):
    answer = await edge.client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        max_completion_tokens=9,
    )
    assert answer.choices[0].message.content == "Hello wörld!"
    assert answer.choices[0].message.role == "assistant"
    [request] = edge.fake.requests
    sent = [(message.role, message.content) for message in request.chat.messages]
    assert sent == [("system", "Be brief."), ("user", "ab")]
    assert request.sampling.max_tokens == 9


async def test_streamed_chat_with_usage(edge):
    stream = await edge.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello wörld!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_streamed_completion_as_it_is_on_the_wire(edge):
    body = {"model": "demo", "prompt": "x", "stream": True}
    async with edge.raw.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        text = (await response.aread()).decode()
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert '"text":" wörld"' in events[1]
    assert "usage" not in text


async def test_fields_beyond_openais_are_passed_on(edge):
    extra = {"cache_salt": "s", "priority": 3, "return_token_ids": True, "best_of": 1,
             "echo": False, "suffix": "", "truncate_prompt_tokens": None}  # fmt: skip
    body = {"prompt": "x", **extra}
    answer = (await edge.raw.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["token_ids"] == [100, 101, 102]
    body = {"messages": [{"role": "user", "content": "x"}], **extra}
    answer = (await edge.raw.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["token_ids"] == [100, 101, 102]
    for path, prompt in (("completions", {"prompt": "x"}), ("chat/completions", body)):
        streamed = {**prompt, "stream": True, "return_token_ids": True}
        text = (await edge.raw.post(f"/v1/{path}", json=streamed)).text
        events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        ids = [event["choices"][0].get("token_ids", []) for event in events]
        assert [one for part in ids for one in part] == [100, 101, 102]
    for request in edge.fake.requests[:2]:
        assert (request.cache_salt, request.priority) == ("s", 3)


async def test_several_prompts_and_outputs_are_choices_in_order(edge):
    edge.fake.words = ("x",)
    answer = await edge.client.completions.create(
        model="demo", prompt=["a", "b"], n=2, seed=2**64 - 1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 4)
    by_id = {request.request_id[-2:]: request for request in edge.fake.requests}
    sent = [(by_id[f"-{i}"].text, by_id[f"-{i}"].sampling.seed) for i in range(4)]
    assert sent == [("a", 2**64 - 1), ("a", 0), ("b", 2**64 - 1), ("b", 0)]


async def test_streamed_outputs_are_told_apart_by_index(edge):
    stream = await edge.client.completions.create(model="demo", prompt="a", n=3, stream=True)
    texts: dict[int, str] = {}
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == dict.fromkeys(range(3), "Hello wörld!")


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
async def test_prompts_of_token_ids(edge, prompt):
    await edge.client.completions.create(model="demo", prompt=prompt)
    assert list(edge.fake.requests[0].tokens.token_ids) == [1, 2, 3]


async def test_logprobs(edge):
    chat = await edge.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    entry = chat.choices[0].logprobs.content[1]
    assert (entry.token, entry.logprob, entry.bytes) == (" wörld", -0.5, list(" wörld".encode()))
    assert [top.token for top in entry.top_logprobs] == [" wörld", "alt1"]
    plain = await edge.client.completions.create(model="demo", prompt="x", logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Hello", " wörld", "!"]
    assert logprobs.text_offset == [0, 5, 11]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"Hello": -0.5, "alt1": -1.5}
    stream = await edge.client.completions.create(model="demo", prompt="x", logprobs=0, stream=True)
    offsets = [c.choices[0].logprobs.text_offset async for c in stream if c.choices[0].logprobs]
    assert offsets == [[0], [5], [11]]


async def test_models(edge):
    models = await edge.client.models.list()
    assert [model.id for model in models.data] == ["demo"]
    model = await edge.client.models.retrieve("demo")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError):
        await edge.client.models.retrieve("other")


async def test_explanation_comes_when_asked_for(edge):
    body: dict[str, Any] = {"prompt": "x", "explain": True}
    answer = (await edge.raw.post("/v1/completions", json=body)).json()
    assert answer["baton"][0]["stages"][0]["name"] == "prefill"
    assert answer["baton"][0]["placement"]["decode_worker_id"] == "d1"
    answer = (await edge.raw.post("/v1/completions", json={"prompt": "x"})).json()
    assert "baton" not in answer


async def test_kept_answer_is_allowed_per_request_and_marked(edge):
    body: dict[str, Any] = {"prompt": "x", "temperature": 0, "cache_response": True, "n": 2}
    answer = (await edge.raw.post("/v1/completions", json=body)).json()
    assert answer["usage"]["response_cached"] is True
    assert all(request.cache_response for request in edge.fake.requests)
    answer = (await edge.raw.post("/v1/completions", json={"prompt": "x"})).json()
    assert "response_cached" not in answer["usage"]
    assert not edge.fake.requests[-1].cache_response
