"""Kept answers and pinned prefixes through a real scheduler and a real cache service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton.core.errors import InvalidRequest, KvCacheFull, NoWorker
from baton.core.hashing import block_hashes, root_hash
from baton.v1 import inference_pb2
from baton.wire.errors import rpc_errors
from tests.support.cache_process import ANSWER_TTL_S, Cache
from tests.support.eventually import eventually
from tests.support.fake_workers import FINGERPRINT, MODEL, expected_text
from tests.support.scheduler_rig import Answer, Rig

PROMPT = "the same question"
PATIENCE_S = 10.0
"""Wait for the cache on a busy machine too."""


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    running = Cache(1 << 20, pinned_bytes=4 * FINGERPRINT.layout.block_bytes)
    await running.server.start()
    yield running
    await running.server.stop(None)


@pytest.fixture
async def rig(cache: Cache) -> AsyncIterator[Rig]:
    async with Rig(cache_timeout_s=PATIENCE_S) as running:
        running.members.observe(cache.announcement())
        yield running


async def ask(rig: Rig, prompt: str = PROMPT, **fields: Any) -> Answer:
    return await rig.ask(prompt, **{"cache_response": True, **fields})


async def ask_and_keep(rig: Rig, cache: Cache, **fields: Any) -> Answer:
    before = cache.value("cache_answers", outcome="stored")
    answer = await ask(rig, **fields)
    await eventually(lambda: cache.value("cache_answers", outcome="stored") == before + 1)
    return answer


def num_computed(rig: Rig) -> int:
    """Calls that workers got."""
    return len(rig.decodes[0].orders) + len(rig.prefills[0].orders)


def without_names(answer: Answer) -> list[Any]:
    """Its messages without what differs from call to call."""
    messages = []
    for message in answer.messages:
        plain = inference_pb2.GenerateResponse()
        plain.CopyFrom(message)
        for name in ("request_id", "trace_id", "stages", "placement", "usage"):
            plain.ClearField(name)
        messages.append(plain)
    return messages


async def test_identical_request_is_answered_without_a_worker(rig: Rig, cache: Cache) -> None:
    fields: dict[str, Any] = {"sampling": {"logprobs": True, "top_logprobs": 2}}
    first = await ask_and_keep(rig, cache, **fields)
    assert first.text == expected_text(PROMPT, 8)
    assert not first.last.usage.response_cached
    computed = num_computed(rig)

    again = await ask(rig, **fields)
    assert num_computed(rig) == computed
    assert without_names(again) == without_names(first), "other texts, ids or log-probabilities"
    assert len(again.messages) == len(first.messages)
    usage = again.last.usage
    assert usage.response_cached
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 8)
    assert usage.cached_tokens == len(PROMPT)
    assert again.last.request_id != first.last.request_id
    assert list(again.stages()) == ["tokenize", "answer_lookup"]
    assert rig.metric("baton_kept_answers_total", outcome="hit") == 1
    assert rig.metric("baton_requests_total", status="ok") == 2
    assert rig.nothing_held()


async def test_text_and_its_token_ids_are_the_same_request(rig: Rig, cache: Cache) -> None:
    await ask_and_keep(rig, cache)
    tokens = inference_pb2.TokenPrompt(token_ids=map(ord, PROMPT))
    assert (await ask(rig, prompt="", tokens=tokens)).last.usage.response_cached


@pytest.mark.parametrize(
    "change",
    [
        {"cache_salt": "another tenant"},
        {"prompt": "another question"},
        {"sampling": {"seed": 2}},
        {"sampling": {"max_tokens": 7}},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"stop": ["zz"]}},
        {"keep_special_tokens": True},
        {"cache_response": False},
    ],
)
async def test_any_other_request_is_computed(
    rig: Rig, cache: Cache, change: dict[str, Any]
) -> None:
    await ask_and_keep(rig, cache, cache_salt="tenant")
    computed = num_computed(rig)
    answer = await ask(rig, **{"cache_salt": "tenant", **change})
    assert num_computed(rig) > computed
    assert not answer.last.usage.response_cached


async def test_nothing_is_kept_unless_asked_for_and_determined(rig: Rig, cache: Cache) -> None:
    await ask(rig, cache_response=False)
    request = rig.request(PROMPT, cache_response=True)
    request.sampling.ClearField("seed")
    request.sampling.temperature = 1.0
    async for _ in rig.stub.Generate(request, timeout=5):
        pass
    assert cache.value("cache_answers", outcome="misses") == 0
    # Without noise no seed is needed.
    request.sampling.temperature = 0.0
    async for _ in rig.stub.Generate(request, timeout=5):
        pass
    await eventually(lambda: cache.value("cache_answers", outcome="stored") == 1)


async def test_an_answer_is_kept_under_what_computed_it_only(rig: Rig, cache: Cache) -> None:
    rig.prefills[0].pauses.hold("compute")
    asking = asyncio.create_task(ask(rig))
    await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
    await rig.replace_weights()
    rig.members.observe(cache.announcement())
    assert (await asking).text == expected_text(PROMPT, 8)
    assert rig.metric("baton_kept_answers_total", outcome="not_kept") == 1
    await ask_and_keep(rig, cache)
    assert (await ask(rig)).last.usage.response_cached


async def test_answer_expires(rig: Rig, cache: Cache) -> None:
    await ask_and_keep(rig, cache)
    cache.now = ANSWER_TTL_S - 1
    assert (await ask(rig)).last.usage.response_cached
    cache.now = ANSWER_TTL_S
    assert not (await ask(rig)).last.usage.response_cached


async def test_answer_that_failed_is_not_kept(cache: Cache) -> None:
    async with Rig(max_attempts=1, cache_timeout_s=PATIENCE_S) as rig:
        rig.members.observe(cache.announcement())
        rig.decodes[0].fail_at_index = 3
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(rig)
        rig.decodes[0].fail_at_index = None
        answer = await ask_and_keep(rig, cache)
        assert answer.text == expected_text(PROMPT, 8)
        assert cache.value("cache_answers", outcome="stored") == 1


async def test_cache_that_is_gone_costs_nothing_but_its_help(rig: Rig, cache: Cache) -> None:
    await ask_and_keep(rig, cache)
    await cache.server.stop(None)
    answer = await ask(rig)
    assert answer.text == expected_text(PROMPT, 8)
    assert not answer.last.usage.response_cached
    assert rig.metric("baton_kept_answers_total", outcome="failed") == 1


async def test_damaged_answer_is_a_miss(rig: Rig, cache: Cache) -> None:
    await ask_and_keep(rig, cache)
    (key,) = cache.answers._kept
    for content in (b"\xff\xff", inference_pb2.GenerateResponse(text="x").SerializeToString()):
        cache.answers.put(key, content)
        answer = await ask(rig)
        assert answer.text == expected_text(PROMPT, 8)
        assert not answer.last.usage.response_cached


async def test_prompt_is_pinned_by_the_hashes_that_its_requests_look_for(
    rig: Rig, cache: Cache
) -> None:
    prompt = "x" * 50
    with rpc_errors():
        pin = (
            await rig.stub.PinPrefix(
                inference_pb2.PinPrefixRequest(text=prompt, cache_salt="t", label="system"),
                timeout=5,
            )
        ).pin
    root = root_hash(FINGERPRINT.digest(), "t")
    hashes = list(block_hashes(root, [ord("x")] * 50, FINGERPRINT.layout.block_size))
    assert (pin.num_blocks, pin.num_stored_blocks, pin.label) == (3, 0, "system")
    assert pin.remaining.ToSeconds() == 24 * 3600
    assert cache.pins.current()[0].block_hashes == tuple(hashes)
    listed = await rig.stub.ListPinnedPrefixes(inference_pb2.ListPinnedPrefixesRequest(), timeout=5)
    assert list(listed.pins) == [pin]
    unpin = inference_pb2.UnpinPrefixRequest(pin_id=pin.pin_id)
    assert (await rig.stub.UnpinPrefix(unpin, timeout=5)).found
    assert not (await rig.stub.UnpinPrefix(unpin, timeout=5)).found
    assert cache.pins.current() == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"text": "short"}, InvalidRequest),
        ({"text": ""}, InvalidRequest),
        ({"text": "x" * 100}, KvCacheFull),
        ({"text": "x" * 50, "cache_salt": "s" * 257}, InvalidRequest),
        ({"text": "x" * 50, "label": "l" * 129}, InvalidRequest),
    ],
)
async def test_pins_that_cannot_be_are_refused(
    rig: Rig, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error), rpc_errors():
        await rig.stub.PinPrefix(inference_pb2.PinPrefixRequest(model=MODEL, **fields), timeout=5)


async def test_without_a_cache_service_a_pin_says_so() -> None:
    async with Rig() as rig:
        with pytest.raises(NoWorker, match="cache"), rpc_errors():
            await rig.stub.PinPrefix(inference_pb2.PinPrefixRequest(text="x" * 50), timeout=5)


async def test_tenants_neither_see_nor_take_back_each_others_pins(cache: Cache) -> None:
    async with Rig(api_keys="secret-a=acme,secret-g=globex") as rig:
        rig.members.observe(cache.announcement())

        def of(key: str) -> dict[str, Any]:
            return {"timeout": 5, "metadata": [("authorization", f"Bearer {key}")]}

        request = inference_pb2.PinPrefixRequest(text="x" * 20, label="system")
        pin = (await rig.stub.PinPrefix(request, **of("secret-a"))).pin
        assert pin.label == "system"
        listing = inference_pb2.ListPinnedPrefixesRequest()
        assert list((await rig.stub.ListPinnedPrefixes(listing, **of("secret-a"))).pins) == [pin]
        assert not (await rig.stub.ListPinnedPrefixes(listing, **of("secret-g"))).pins
        unpin = inference_pb2.UnpinPrefixRequest(pin_id=pin.pin_id)
        assert not (await rig.stub.UnpinPrefix(unpin, **of("secret-g"))).found
        assert (await rig.stub.UnpinPrefix(unpin, **of("secret-a"))).found
