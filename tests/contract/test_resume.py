"""Answers that a scheduler continues for a caller who has their beginning."""

from __future__ import annotations

from typing import Any

import pytest

from baton.core.errors import ErrorReason
from baton.v1 import inference_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import FINGERPRINT, expected_text
from tests.support.scheduler_rig import Answer, Rig


async def _resume(rig: Rig, had: Answer, num_tokens: int, **fields: Any) -> Answer:
    """Asks for what follows the first tokens of an answer."""
    return await rig.ask("hello", resume=_point(had, num_tokens), **fields)


def _point(had: Answer, num_tokens: int) -> inference_pb2.ResumePoint:
    text = had.text[:num_tokens]
    return inference_pb2.ResumePoint(token_ids=map(ord, text), text_chars=len(text))


@pytest.mark.parametrize("num_tokens", [1, 4, 7])
async def test_the_rest_is_what_would_have_followed(num_tokens: int) -> None:
    async with Rig() as rig:
        had = await rig.ask("hello")
        rest = await _resume(rig, had, num_tokens)
        assert had.text[:num_tokens] + rest.text == expected_text("hello", 8)
        assert rest.messages[0].token_index == num_tokens
        assert rest.messages[0].seed == 1
        usage = rest.last.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (5, 8)
        await eventually(rig.nothing_held)


async def test_text_that_was_held_back_comes_with_the_rest() -> None:
    async with Rig() as rig:
        whole = expected_text("hello", 8)
        point = inference_pb2.ResumePoint(token_ids=map(ord, whole[:4]), text_chars=2)
        rest = await rig.ask("hello", resume=point)
        assert rest.text == whole[2:]
        assert rest.messages[0].num_tokens == 1


async def test_a_stop_string_may_begin_in_what_the_caller_has() -> None:
    async with Rig() as rig:
        whole = expected_text("hello", 8)
        point = inference_pb2.ResumePoint(token_ids=map(ord, whole[:4]), text_chars=3)
        rest = await rig.ask("hello", resume=point, sampling={"stop": [whole[3:6]]})
        assert rest.last.stop_reason == whole[3:6]
        assert rest.last.usage.completion_tokens == 6


async def test_nothing_is_left_after_the_last_token() -> None:
    async with Rig() as rig:
        had = await rig.ask("hello")
        reason, message = await rig.failure(resume=_point(had, 8))
        assert reason is ErrorReason.INVALID_REQUEST
        assert "nothing is left" in message


async def test_only_workers_that_compute_the_same_go_on() -> None:
    async with Rig(worker_wait_s=0.0) as rig:
        had = await rig.ask("hello")
        digest = FINGERPRINT.digest()
        assert [message.fingerprint for message in had.messages[:2]] == [digest, b""]
        point = _point(had, 4)
        point.fingerprint = digest
        assert (await rig.ask("hello", resume=point)).text == expected_text("hello", 8)[4:]
        point.fingerprint = b"of other weights"
        reason, _ = await rig.failure(resume=point)
        assert reason is ErrorReason.KV_LAYOUT_MISMATCH


async def test_the_chosen_seed_is_told_once() -> None:
    async with Rig() as rig:
        request = rig.request("hello")
        request.sampling.ClearField("seed")
        messages = [message async for message in rig.stub.Generate(request, timeout=20)]
        assert [message.HasField("seed") for message in messages[:2]] == [True, False]
        assert messages[0].seed == rig.prefills[0].orders[0].sampling.seed
