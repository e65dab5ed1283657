"""OpenAI's own client against a whole system: what it sends and reads, with a real model behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
import pytest_asyncio

from tests.support.eventually import eventually
from tests.support.system import Process, System
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]
TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
SAY = [{"role": "user", "content": "Say something."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    async with System(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        await running.workers("llama")
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(system: System) -> Process:
    process = system.spawn("gateway", http_port=0)
    await system.wait_ready(process)
    return process


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Process) -> AsyncIterator[Any]:
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
    [address] = [line["http_address"] for line in lines if "http_address" in line]
    made = openai.AsyncOpenAI(
        base_url=f"http://{address}/v1",
        api_key="unused",
        max_retries=0,
        timeout=40,
        http_client=openai.DefaultAsyncHttpxClient(verify=False),
    )
    yield made
    await made.close()


async def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    asked = {"model": "llama", "prompt": "def f(", "max_tokens": 24, "seed": 5}
    whole = await client.completions.create(**asked, logprobs=2)
    stream = await client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text != ""
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == len("def f(")
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == whole.usage.completion_tokens
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


async def test_chat_keeps_to_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "good": {"type": "boolean"}},
        "required": ["kind", "good"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model="llama",
        messages=SAY,
        temperature=0,
        max_completion_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert set(json.loads(answer.choices[0].message.content)) == {"kind", "good"}


async def test_a_tool_that_must_be_called_is_called(client: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "parameters": parameters}
    answer = await client.chat.completions.create(
        model="llama",
        messages=SAY,
        temperature=0,
        max_completion_tokens=300,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in {"C", "F"}


async def test_embeddings_have_length_1_and_are_those_of_the_sdk(
    client: Any, system: System
) -> None:
    texts = ["def add(a, b):", "class Stack:"]
    answer = await client.embeddings.create(model="llama", input=texts)
    vectors = [entry.embedding for entry in answer.data]
    assert [sum(value**2 for value in vector) for vector in vectors] == pytest.approx([1.0, 1.0])
    own = await system.client.embed(texts)
    for theirs, ours in zip(vectors, own.vectors, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)
    tokens = [await system.client.tokenize(text) for text in texts]
    assert answer.usage.prompt_tokens == sum(map(len, tokens)) == own.usage.prompt_tokens
    await system.assert_nothing_held()


@pytest.mark.parametrize(
    ("fields", "expected", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
    ],
)
async def test_errors_have_openais_classes(
    client: Any, fields: dict[str, Any], expected: type[Exception], code: str
) -> None:
    with pytest.raises(expected) as caught:
        await client.completions.create(**{"model": "llama", "prompt": "x", **fields})
    assert caught.value.code == code  # type: ignore[attr-defined]


async def test_leaving_a_stream_cancels_it_everywhere(client: Any, system: System) -> None:
    stream = await client.completions.create(
        model="llama",
        prompt="x",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        break
    await stream.close()

    async def is_idle() -> bool:
        return not (await system.client.status()).requests_by_state

    await eventually(is_idle, timeout_s=2.0)
    await system.assert_nothing_held()
