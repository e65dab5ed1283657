"""What the gateway answers when something is wrong: in the body, behind it, or in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from baton.core.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    PromptTooLong,
    QueueFull,
    Unauthenticated,
)
from baton.gateway.schedulers import Schedulers
from baton.gateway.unsupported_fields import REFUSED
from tests.support.eventually import eventually
from tests.support.gateway_rig import Edge, NoMembers, running_gateway
from tests.support.repository import ROOT

JSON = {"content-type": "application/json"}


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (InvalidRequest("bad"), openai.BadRequestError, "invalid_value"),
        (PromptTooLong("long"), openai.BadRequestError, "context_length_exceeded"),
        (ModelNotFound("no"), openai.NotFoundError, "model_not_found"),
        (Unauthenticated("key"), openai.AuthenticationError, "invalid_api_key"),
        (QueueFull("full", retry_after_s=1.5), openai.RateLimitError, "queue_full"),
        (NoWorker("none"), openai.InternalServerError, "no_worker"),
        (DeadlineExceeded("late"), openai.InternalServerError, "deadline"),
        (Internal("secret"), openai.InternalServerError, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_have_openais_classes(
    edge, error, expected, code, stream
):
    edge.fake.before.append(error)
    with pytest.raises(expected) as caught:
        await edge.client.completions.create(model="demo", prompt="x", stream=stream)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)
    headers = caught.value.response.headers
    assert headers["x-request-id"]
    if isinstance(error, QueueFull):
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1500")
    elif isinstance(error, NoWorker):
        assert headers["retry-after"] == "1"
    elif not isinstance(error, Internal | DeadlineExceeded):
        assert 400 <= caught.value.response.status_code < 500
    else:
        assert headers["x-should-retry"] == "false"


async def test_error_in_the_middle_of_a_stream_is_an_event(edge):
    edge.fake.after.append(NoWorker("gone"))
    stream = await edge.client.completions.create(model="demo", prompt="x", stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="gone"):
        texts.extend([chunk.choices[0].text async for chunk in stream])
    await eventually(lambda: edge.gateway.num_running == 0)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": []}, "prompt must not be empty"),
        ("completions", {"prompt": "x", "n": 0}, "n:"),
        ("completions", {"prompt": "x", "n": 9}, "at most 8"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ("completions", {"prompt": "x", "echo": True}, "echo"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ("completions", {"prompt": "x", "n": 2, "best_of": 3}, "best_of must be n"),
        ("completions", {"prompt": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("completions", {"prompt": "x", "allowed_token_ids": [1]}, "allowed_token_ids"),
        ("completions", {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ("completions",
         {"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}},
         "continuous_usage_stats"),
        ("chat/completions",
         {"messages": [{"role": "user"}], "continue_final_message": True},
         "continue_final_message"),
        ("completions", {"prompt": [-1]}, "does not fit"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "type 'text'"),
        ("chat/completions", {"messages": [{"role": "user"}], "tools": [{}]}, "tools"),
        ("chat/completions",
         {"messages": [{"role": "user"}], "response_format": {"type": "yaml"}},
         "response_format"),
        ("chat/completions",
         {"messages": [{"role": "user"}], "response_format": {"type": "json_schema"}},
         "json_schema.schema"),
        ("completions", {"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]}, "once"),
        ("completions",
         {"prompt": "x", "guided_regex": "a", "structured_outputs": {"regex": "a"}}, "once"),
        ("completions", {"prompt": "x", "structured_outputs": {"structural_tag": {}}},
         "structural_tag"),
        ("completions", {"prompt": "x", "guided_json": "{"}, "guide.json_schema"),
        ("completions", {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ("completions", {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "streamed"),
        ("completions", {"prompt": "x", "guided_choice": []}, "guide.choice"),
        ("completions", {"prompt": "x", "guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ("chat/completions", {"messages": [{"role": "user"}], "top_logprobs": 3}, "logprobs"),
        ("completions", [1], "body"),
    ],
)  # fmt: skip
async def test_bad_bodies_name_what_is_wrong(edge, path, body, message):
    response = await edge.raw.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert not edge.fake.requests


async def test_bodies_are_bounded_and_must_be_json(edge):
    response = await edge.raw.post("/v1/completions", content=b"{", headers=JSON)
    assert response.status_code == 400
    response = await edge.raw.post("/v1/completions", json={"prompt": "x" * 30_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    response = await edge.raw.post(
        "/v1/completions", content=bytes(100 * 1024 * 1024), headers=JSON
    )
    assert response.status_code == 413
    assert not edge.fake.requests


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("completions", {"regex": "a+"}, "regex is not supported; use structured_outputs"),
        ("completions", {"ebnf": "root ::= x"}, "ebnf"),
        ("completions", {"stop_regex": "a"}, "stop_regex"),
        ("completions", {"json_schema": {"type": "object"}}, "json_schema"),
        ("completions", {"grammar": "root ::= x"}, "grammar"),
        ("completions", {"n_predict": 3}, "use max_tokens"),
        ("completions", {"add_special_tokens": False}, "add_special_tokens"),
        ("completions", {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
         "structured_outputs.whitespace_pattern"),
        ("chat/completions", {"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"add_generation_prompt": False}, "add_generation_prompt"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "prefix": True}]},
         "messages[0].prefix"),
        ("embeddings", {"input_type": "query"}, "input_type"),
    ],
)  # fmt: skip
async def test_fields_that_change_the_meaning_are_refused_by_name(edge, path, fields, message):
    body = {"prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}], **fields}
    response = await edge.raw.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not edge.fake.requests


async def test_harmless_fields_are_ignored(edge):
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    unset = {"prediction": None, "bad_words": [], "echo": False, "modalities": ["text"]}
    body = {"messages": [{"role": "user", "content": "x", "refusal": None}], **harmless, **unset}
    assert (await edge.raw.post("/v1/chat/completions", json=body)).status_code == 200


def test_the_page_lists_every_refused_field():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert {name for name in REFUSED if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_bodies_that_a_web_page_can_send_unasked_are_refused(edge, kind):
    headers = {"content-type": kind} if kind else {}
    content = b'{"prompt": "x"}'
    response = await edge.raw.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
    assert not edge.fake.requests
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = await edge.raw.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 200


async def test_without_a_scheduler_the_answer_says_so():
    schedulers = Schedulers("", NoMembers(), 5.0)  # type: ignore[arg-type]
    with pytest.raises(NoWorker, match="no scheduler"):
        await schedulers.client()
