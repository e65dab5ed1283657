"""Tools in chat completions, as OpenAI's own client sees them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from baton.v1 import common_pb2
from tests.support.gateway_rig import Edge, running_gateway

PLACE = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
         "$defs": {"City": {"type": "string"}}}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": PLACE}}
TIME = {"type": "function", "function": {"name": "time", "description": "Tells it."}}
ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "?"}]}
HERMES = ("Let me see.\n", '<tool_call>\n{"name": "weather", "argum', 'ents": {"city": ', '"Ulm"}}',
          '\n</tool_call>\n<tool_call>{"name": "time"}', "</tool_call>")  # fmt: skip


JSON = {"content-type": "application/json"}


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


async def test_calls_are_taken_out_of_the_text(edge):
    edge.fake.words = HERMES
    answer = await edge.client.chat.completions.create(**ASK, tools=[WEATHER, TIME])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [
        ("function", "weather"),
        ("function", "time"),
    ]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Ulm"}, {}]
    assert len({call.id for call in calls}) == 2
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    sent = edge.fake.requests[0]
    assert json.loads(sent.chat.tools_json) == [WEATHER, TIME]
    assert not sent.sampling.HasField("guide")


async def test_streamed_calls_name_the_tool_first_and_then_its_arguments(edge):
    edge.fake.words = HERMES
    stream = await edge.client.chat.completions.create(**ASK, tools=[WEATHER, TIME], stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me see."
    deltas = [delta for choice in choices for delta in choice.delta.tool_calls or ()]
    heads = [delta for delta in deltas if delta.id]
    assert [(head.index, head.type, head.function.name) for head in heads] == [
        (0, "function", "weather"),
        (1, "function", "time"),
    ]
    assert deltas.index(heads[1]) > 2, "arguments come in pieces"
    texts = ["", ""]
    for delta in deltas:
        texts[delta.index] += delta.function.arguments
        assert delta.id or (delta.type, delta.function.name) == (None, None)
    assert [json.loads(text) for text in texts] == [{"city": "Ulm"}, {}]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]


async def test_openais_stream_helper_puts_calls_together(edge):
    edge.fake.words = HERMES
    async with edge.client.chat.completions.stream(**ASK, tools=[WEATHER, TIME]) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "time"]
    assert json.loads(calls[0].function.arguments) == {"city": "Ulm"}


async def test_every_choice_has_calls_of_its_own(edge):
    edge.fake.words = ('{"name": "time", "parameters": {}}',)
    stream = await edge.client.chat.completions.create(**ASK, tools=[TIME], n=2, stream=True)
    ids: dict[int, str] = {}
    async for chunk in stream:
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.id:
                ids[chunk.choices[0].index] = delta.id
    assert set(ids) == {0, 1}
    assert len(set(ids.values())) == 2


async def test_an_answer_without_calls_is_text(edge):
    answer = await edge.client.chat.completions.create(**ASK, tools=[TIME])
    assert answer.choices[0].message.content == "Hello wörld!"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


async def test_an_answer_that_was_cut_off_says_so(edge):
    edge.fake.words, edge.fake.finish = HERMES[:3], common_pb2.FINISH_REASON_LENGTH
    answer = await edge.client.chat.completions.create(**ASK, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": '


async def test_one_call_at_a_time_when_asked_for(edge):
    edge.fake.words = HERMES
    answer = await edge.client.chat.completions.create(
        **ASK, tools=[WEATHER, TIME], parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls) == 1


async def test_logprobs_come_along(edge):
    edge.fake.words = HERMES
    stream = await edge.client.chat.completions.create(
        **ASK, tools=[TIME], stream=True, logprobs=True
    )
    entries = [
        entry.token
        async for chunk in stream
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert tuple(entries) == HERMES


async def test_no_tool_may_be_used(edge):
    edge.fake.words = HERMES
    answer = await edge.client.chat.completions.create(**ASK, tools=[TIME], tool_choice="none")
    assert answer.choices[0].message.content == "".join(HERMES)
    assert edge.fake.requests[0].chat.tools_json == ""


async def test_a_named_tool_is_forced_by_the_schema_of_its_arguments(edge):
    edge.fake.words = ('{"city": ', '"Ulm"}')
    answer = await edge.client.chat.completions.create(
        **ASK,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Ulm"}')
    assert json.loads(edge.fake.requests[0].sampling.guide.json_schema) == PLACE


async def test_some_tool_is_forced_by_a_schema_of_calls(edge):
    calls = [{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "time", "arguments": {}}]
    edge.fake.words = tuple(json.dumps(calls))
    answer = await edge.client.chat.completions.create(
        **ASK, tools=[WEATHER, TIME], tool_choice="required"
    )
    found = answer.choices[0].message.tool_calls
    assert [call.function.name for call in found] == ["weather", "time"]
    schema = json.loads(edge.fake.requests[0].sampling.guide.json_schema)
    jsonschema.validate(calls, schema)
    for bad in ([], [{"name": "other", "arguments": {}}],
                [{"name": "weather", "arguments": {"city": 1}}]):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    await edge.client.chat.completions.create(
        **ASK, tools=[TIME], tool_choice="required", parallel_tool_calls=False
    )
    schema = json.loads(edge.fake.requests[1].sampling.guide.json_schema)
    assert schema["maxItems"] == 1


async def test_calls_and_answers_of_the_history_are_passed_on(edge):
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]},
    ]
    await edge.client.chat.completions.create(model="demo", messages=messages, tools=[TIME])
    _, assistant, tool = edge.fake.requests[0].chat.messages
    assert json.loads(assistant.tool_calls_json) == [call]
    assert (tool.role, tool.content, tool.tool_call_id) == ("tool", "noon", "c1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, "function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [TIME, TIME]}, "different names"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "not one of tools",
        ),
        ({"tool_choice": "required"}, "needs tools"),
        (
            {
                "tools": [TIME],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "demands a call",
        ),
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"function_call": "auto"}, "use tools"),
    ],
)
async def test_bad_tools_are_refused(edge, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        await edge.client.chat.completions.create(**ASK, extra_body=fields)
    assert not edge.fake.requests


async def test_a_body_that_is_nested_too_deeply_is_refused(edge):
    deep = "[" * 900 + "]" * 900
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "tools": {deep}}}'
    response = await edge.raw.post("/v1/chat/completions", content=body.encode(), headers=JSON)
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]
