from __future__ import annotations

import orjson
import pytest

from baton.client import Chunk, Completion, Guide, InvalidRequest, Logprob, TopLogprob, Usage
from baton.core.errors import ErrorReason, error_for
from baton.gateway.answer_format import AnswerHeader, usage_json
from baton.gateway.chat_completions import ChatBody, ChatFormat
from baton.gateway.completions import CompletionBody, CompletionFormat
from baton.gateway.failures import error_response
from baton.gateway.sampling_body import parse
from baton.gateway.settings import GatewaySettings
from baton.wire.errors import CATALOGUE

HEAD = AnswerHeader(answer_id="cmpl-1", created=5, model="demo")
HALF = Logprob(7, "\ufffd", b"\xe2\x82", float("-inf"), (TopLogprob(7, "\ufffd", b"\xe2", -0.1),))


def test_logprobs_are_valid_json_whatever_the_model_said():
    answer = Completion(text="", finish_reason="stop", usage=Usage(), logprobs=(HALF,))
    body = CompletionFormat(HEAD).whole([answer], {})
    logprobs = orjson.loads(orjson.dumps(body))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2\\x82"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe2": -0.1}]
    chat = ChatFormat(HEAD).whole([answer], {})["choices"][0]["logprobs"]["content"][0]
    assert (chat["bytes"], chat["logprob"]) == ([0xE2, 0x82], -9999.0)


def test_prompt_logprobs_have_the_shape_of_vllm():
    top = (TopLogprob(5, "b", b"b", -0.5), TopLogprob(7, "a", b"a", -1.5))
    entries = (Logprob(7, "a", b"a", -1.5, top), Logprob(9, "c", b"c", float("-inf"), top))
    answer = Completion(text="", finish_reason="stop", usage=Usage(), prompt_logprobs=entries)
    expected = [
        None,
        {
            "7": {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        },
        {
            "9": {"logprob": -9999.0, "rank": None, "decoded_token": "c"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "7": {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
        },
    ]
    body = CompletionFormat(HEAD).whole([answer], {})
    assert body["choices"][0]["prompt_logprobs"] == expected
    assert ChatFormat(HEAD).whole([answer], {})["prompt_logprobs"] == expected


def test_message_without_text_makes_no_chunk():
    assert CompletionFormat(HEAD).pieces(0, Chunk(request_id="r")) == []
    assert ChatFormat(HEAD).pieces(0, Chunk(num_tokens=1)) == []


def test_last_text_and_finish_reason_are_told_apart_in_a_chat():
    text, last = ChatFormat(HEAD).pieces(0, Chunk(text="x", finish_reason="length"))
    assert text["choices"][0]["delta"] == {"content": "x"}
    assert text["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"


def test_prompts_count_once_however_many_outputs_they_have():
    usages = [Usage(10, 1, cached_tokens=4), Usage(10, 2, cached_tokens=9), Usage(20, 3, 0)]
    assert usage_json([*usages, Usage(20, 4)], 2)["prompt_tokens"] == 30
    assert usage_json([*usages, Usage(20, 4)], 2)["completion_tokens"] == 10
    assert usage_json(usages[:2], 2)["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_object", "schema": {"type": "object"}},
        {"type": "json_schema", "schema": {"type": "object"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    ],
)
def test_a_schema_is_kept_to_wherever_it_stands(given):
    body = parse(CompletionBody, {"prompt": "x", "response_format": given})
    assert body.guide() == Guide.json_schema({"type": "object"})


@pytest.mark.parametrize(
    "given",
    [
        {"type": "text", "schema": {"type": "object"}},
        {"type": "json_schema", "schema": {}, "json_schema": {"schema": {"type": "object"}}},
    ],
)
def test_schemas_that_contradict_the_rest_are_refused(given):
    body = parse(CompletionBody, {"prompt": "x", "response_format": given})
    with pytest.raises(InvalidRequest, match="response_format"):
        body.guide()


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (ChatBody, {"messages": [{"role": "user"}]}),
        (CompletionBody, {"prompt": "x"}),
        (CompletionBody, {"prompt": [[1]] * 3}),
    ],
)
def test_the_number_of_choices_is_checked_before_any_is_built(cls, fields):
    body = parse(cls, {**fields, "n": 10**15})
    with pytest.raises(InvalidRequest, match="at most 8"):
        body.choices(8)


def test_negative_and_large_seeds_are_seeds():
    body = parse(CompletionBody, {"prompt": "x", "seed": -1, "n": 2})
    assert [choice.options["seed"] for choice in body.choices(8)] == [2**64 - 1, 0]


def test_top_k_of_minus_one_means_all():
    [choice] = parse(CompletionBody, {"prompt": "x", "top_k": -1}).choices(8)
    assert choice.options["top_k"] == 0


def test_logprobs_of_zero_asks_for_the_chosen_tokens_only():
    [choice] = parse(CompletionBody, {"prompt": "x", "logprobs": 0}).choices(8)
    assert choice.options["logprobs"]
    assert choice.options["top_logprobs"] == 0


def test_tools_may_be_listed_when_they_are_not_to_be_used():
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "none"}
    parsed = parse(ChatBody, body)
    assert [choice.options["tools"] for choice in parsed.choices(8)] == [[]]
    assert parsed.tool_use().parser_factory() is None


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_has_a_response(reason):
    response = error_response(error_for(reason, "text"))
    assert response.status_code == CATALOGUE[reason].http_status
    error = orjson.loads(bytes(response.body))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    has_delay = "retry-after" in response.headers
    assert has_delay == (response.status_code in {429, 503})


def test_unknown_models_of_a_body_are_named_with_their_place():
    with pytest.raises(InvalidRequest, match=r"messages\.0\.role"):
        parse(ChatBody, {"messages": [{"content": "x"}]})


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("BATON_GATEWAY_HTTP_PORT", "81")
    assert GatewaySettings().http_port == 81
