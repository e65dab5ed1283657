"""Answers that break off in the middle go on where they stopped, or end with their error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.client import AsyncClient, Client, Internal, NoWorker, RetryPolicy
from baton.core.errors import BatonError, WorkerDraining
from tests.support.fake_inference import FAST, FakeInference, serve

WHOLE = "Hello wörld!"


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeInference]:
    servicer = FakeInference(seed=99)
    servicer.server, servicer.address = await serve(servicer)
    yield servicer
    await servicer.server.stop(0)


async def test_a_broken_stream_goes_on_after_its_last_token(fake, client):
    fake.after += [NoWorker("gone"), WorkerDraining("going")]
    chunks = [chunk async for chunk in client.generate("say", stream=True, logprobs=True)]
    assert "".join(chunk.text for chunk in chunks) == WHOLE
    assert [chunk.token_index for chunk in chunks if chunk.num_tokens] == [0, 1, 2]
    assert all(not chunk.token_ids for chunk in chunks)  # not asked for
    first, second, third = fake.requests
    assert not first.HasField("resume")
    assert not first.sampling.HasField("seed")
    assert list(second.resume.token_ids) == [100]
    assert second.resume.text_chars == len("Hello")
    assert list(third.resume.token_ids) == [100, 101]
    assert third.resume.text_chars == len("Hello wörld")
    assert (second.sampling.seed, third.sampling.seed) == (99, 99)
    assert (second.resume.fingerprint, third.resume.fingerprint) == (b"weights", b"weights")


async def test_a_completion_shows_nothing_of_the_break(fake, client):
    expected = await client.generate("say", logprobs=True, return_token_ids=True)
    fake.after.append(NoWorker("gone"))
    answer = await client.generate("say", logprobs=True, return_token_ids=True, request_id="mine")
    assert answer.text == expected.text == WHOLE
    assert answer.token_ids == expected.token_ids == (100, 101, 102)
    assert answer.logprobs == expected.logprobs
    assert answer.usage == expected.usage
    assert (answer.request_id, answer.num_attempts) == ("mine", 2)
    # The first call may still run at the server.
    assert fake.requests[-1].request_id not in {"", "mine"}


async def test_the_blocking_client_does_the_same(fake):
    def use() -> str:
        with Client(fake.address, timeout_s=10, retry=FAST) as client:
            return client.generate("say").text

    fake.after.append(NoWorker("gone"))
    assert await asyncio.to_thread(use) == WHOLE


@pytest.mark.parametrize("error", [Internal("a defect")])
async def test_what_another_call_cannot_mend_ends_the_answer(fake, client, error: BatonError):
    fake.after.append(error)
    with pytest.raises(type(error)):
        await client.generate("say")
    assert len(fake.requests) == 1


async def test_without_a_seed_to_go_on_with_nothing_is_sent_twice(fake, client):
    fake.seed = None
    fake.after.append(NoWorker("gone"))
    with pytest.raises(NoWorker):
        await client.generate("say")
    assert len(fake.requests) == 1


async def test_a_policy_of_one_attempt_asks_for_no_ids_and_never_goes_on(fake):
    fake.after.append(NoWorker("gone"))
    async with AsyncClient(fake.address, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(NoWorker):
            await client.generate("say")
    assert [request.return_token_ids for request in fake.requests] == [False]


async def test_attempts_are_bounded(fake, client):
    fake.words = tuple("abcdefgh")
    fake.after += [NoWorker("gone")] * 8
    with pytest.raises(NoWorker):
        await client.generate("say")
    assert len(fake.requests) == FAST.max_attempts


async def test_a_break_after_the_last_message_loses_nothing(fake, client):
    fake.last = [NoWorker("gone")]
    assert (await client.generate("say")).text == WHOLE
    assert len(fake.requests) == 1
