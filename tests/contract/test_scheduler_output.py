"""What the scheduler sends: where an output ends, log-probabilities, and text that is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.scheduler import relay
from baton.v1 import common_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.scheduler_rig import LOST_WITHIN_S, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


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
    assert len(answer.token_ids()) == 6
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


async def test_texts_of_many_tokens_are_asked_for_in_parts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "MAX_DESCRIBED_TOKENS", 4)
    answer = await rig.ask("hello there", sampling={"prompt_logprobs": 2, "max_tokens": 3})
    [entries] = [m.prompt_logprobs for m in answer.messages if m.prompt_logprobs]
    assert "".join(entry.token for entry in entries) == "ello there"
    assert {tuple(top.token for top in entry.top) for entry in entries} == {("A", "B")}
    assert max(rig.tokenizers[0].num_described) == 4
    assert sum(rig.tokenizers[0].num_described) == 30


async def test_logprobs_carry_token_texts(rig: Rig) -> None:
    answer = await rig.ask(sampling={"logprobs": True, "top_logprobs": 2, "max_tokens": 3})
    entries = [entry for message in answer.messages for entry in message.logprobs]
    assert [entry.token for entry in entries] == list(expected_text("hello", 3))
    assert entries[0].logprob == pytest.approx(-0.25)
    assert [(top.token, top.token_bytes) for top in entries[1].top] == [("A", b"A"), ("B", b"B")]


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
