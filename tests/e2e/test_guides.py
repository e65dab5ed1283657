"""Guided outputs and the log-probabilities of prompts through every real process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from baton.client import Guide, InvalidRequest
from tests.support.system import System
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.system import Process

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

NUMBERS = Guide.json_schema({
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": -9999, "maximum": 9999},
            "minItems": 80,
            "maxItems": 90,
        }
    },
    "required": ["numbers"],
    "additionalProperties": False,
})
OPTIONS = {
    "token_ids": list(range(20, 70)),
    "guide": NUMBERS,
    "temperature": 0.9,
    "seed": 4,
    "max_tokens": 1500,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    async with System(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        settings = {
            "speculation": "true",
            "draft_model_path": path,
            "adaptive_drafts": "false",
        }
        workers = [
            await running.worker("prefill", "llama"),
            await running.worker("decode", "llama", **settings),
            await running.worker("decode", "llama", **settings),
        ]
        await running.wait_ready(*workers)
        await running.wait_members(*workers)
        yield running


async def _busy_decode(system: System) -> Process:
    """The worker that is running the request."""
    for process in system.processes:
        is_candidate = process.role == "decode" and process.popen.poll() is None
        if is_candidate and (await system.service_status(process)).kv_blocks["in_use"] > 0:
            return process
    raise AssertionError("no decode worker is busy")


async def test_a_malformed_guide_is_refused_and_nothing_is_held(system: System) -> None:
    for guide in (Guide.regex("(("), Guide.lark("start: x"), Guide.json_schema({"type": "x"})):
        with pytest.raises(InvalidRequest, match=r"guide\.\w+ is refused"):
            await system.client.generate(**{**OPTIONS, "guide": guide})
    await system.assert_nothing_held()


async def test_a_choice_is_one_of_its_texts(system: System) -> None:
    options = ["maybe", "certainly", "nö"]
    answer = await system.client.generate(**{**OPTIONS, "guide": Guide.choice(options)})
    assert answer.text in options
    assert answer.finish_reason == "stop"


async def test_prompt_logprobs_are_told_with_texts(system: System) -> None:
    answer = await system.client.generate("some words", max_tokens=2, prompt_logprobs=2)
    assert "".join(entry.token for entry in answer.prompt_logprobs).endswith("words")
    for entry in answer.prompt_logprobs:
        assert entry.logprob < 0.0
        assert len(entry.top) == 2
        assert entry.top[0].logprob >= entry.top[1].logprob


async def test_json_goes_on_when_its_decode_worker_is_killed_in_the_middle(system: System) -> None:
    whole = await system.client.generate(**OPTIONS, explain=True)
    assert whole.finish_reason == "stop"
    assert 80 <= len(json.loads(whole.text)["numbers"]) <= 90
    assert not whole.placement.local_prefill
    plain = await system.client.generate(**OPTIONS, speculation=False)
    assert plain.text == whole.text

    text, is_killed = "", False
    async for chunk in system.client.generate(**OPTIONS, stream=True):
        text += chunk.text
        if len(text) > 40 and not is_killed:
            is_killed = True
            (await _busy_decode(system)).kill()
    assert is_killed
    assert text == whole.text
    await system.assert_nothing_held()
