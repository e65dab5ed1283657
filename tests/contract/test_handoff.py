"""A prompt computed on one worker and continued on another, when nothing goes wrong."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from baton.v1 import decode_pb2, prefill_pb2
from tests.support.eventually import eventually
from tests.support.tiny_models import load_reference, reference_greedy
from tests.support.workers import Generated, Pair, prompt_of, worker_pair


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 200])
async def test_a_handed_over_request_equals_the_reference(
    pair: Pair, model_path: Path, num_tokens: int
) -> None:
    prompt = prompt_of(num_tokens)
    expected = list(reference_greedy(load_reference(model_path), prompt, 8))
    out = await pair.generate(prompt)
    assert out.token_ids == expected
    assert len(set(expected)) > 2
    num_blocks = -(-num_tokens // 16)
    layout = pair.decode.engine.fingerprint.layout
    assert out.done.blocks == num_blocks
    assert out.done.bytes == num_blocks * layout.block_bytes
    assert out.timings.HasField("queue")
    assert pair.prefill.counts()["held"] > 0


async def test_sampled_tokens_do_not_depend_on_where_the_prompt_was_computed(pair: Pair) -> None:
    prompt = prompt_of(50)
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 77, "logprobs": True, "max_tokens": 12}
    relayed = await pair.generate(prompt, "a", **sampling)
    grant = await pair.reserve(prompt, "b", **sampling)
    local = await pair.run_decode(grant, local_prefill=True)
    assert local.token_ids == relayed.token_ids
    assert len(local.logprobs) == len(relayed.logprobs) == 12
    assert local.finish_reason == 2
    await pair.to_prefill.ReleasePrefill(
        prefill_pb2.ReleasePrefillRequest(request_id="a"), timeout=5
    )


async def test_blocks_are_pushed_while_the_rest_is_computed(pair: Pair) -> None:
    out = await pair.generate(prompt_of(400))
    assert out.done.chunks > 1
    transfer_s = out.done.transfer.ToTimedelta().total_seconds()
    exposed_s = out.done.exposed.ToTimedelta().total_seconds()
    assert 0.0 <= exposed_s < transfer_s


async def test_a_prompt_of_one_step_is_pushed_while_it_is_computed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(60)
    async with worker_pair(model_path, prefill={"layer_group_bytes": 1}) as pair:
        sampler = pair.prefill.engine._steps._sampler
        sample, may_sample = sampler.sample, threading.Event()

        def sample_late(*arguments: Any) -> Any:
            assert may_sample.wait(20)
            return sample(*arguments)

        monkeypatch.setattr(sampler, "sample", sample_late)
        generating = asyncio.create_task(pair.generate(prompt))
        intake = pair.decode.service.loaded().intake
        num_bytes = 4 * pair.decode.engine.fingerprint.layout.block_bytes
        try:
            await eventually(lambda: intake.num_bytes == num_bytes)
        finally:
            may_sample.set()
        out = await generating
        assert out.token_ids == list(reference_greedy(load_reference(model_path), prompt, 8))
        assert out.done.bytes == num_bytes
        await pair.assert_clean()


async def test_blocks_that_decode_has_are_not_sent(pair: Pair) -> None:
    prompt = prompt_of(80)
    received = pair.decode.service.loaded().intake
    block_bytes = pair.decode.engine.fingerprint.layout.block_bytes
    first = await pair.generate(prompt, "req", 1)
    assert received.num_bytes == first.done.bytes == 5 * block_bytes
    second = await pair.generate(prompt, "req", 2)
    assert second.token_ids == first.token_ids
    assert first.done.blocks == 5
    assert second.done.blocks == 1
    assert received.num_bytes - first.done.bytes == second.done.bytes == block_bytes
    assert second.started.cached_tokens == 64


async def test_decode_may_be_called_before_the_prompt_is_computed(pair: Pair) -> None:
    prompt = prompt_of(100)
    grant = await pair.reserve(prompt)
    decoding = asyncio.create_task(pair.run_decode(grant, Generated(token_ids=[0])))
    await pair.run_prefill(pair.prefill_request(prompt, grant))
    out = await decoding
    assert len(out.token_ids) == 8
    assert out.timings.wait_for_kv.ToTimedelta().total_seconds() > 0


async def test_many_requests_at_once(pair: Pair, model_path: Path) -> None:
    reference = load_reference(model_path)
    prompts = [prompt_of(10 + 7 * index, seed=index) for index in range(8)]
    outs = await asyncio.gather(
        *(pair.generate(prompt, f"req-{index}") for index, prompt in enumerate(prompts))
    )
    for prompt, out in zip(prompts, outs, strict=True):
        assert out.token_ids == list(reference_greedy(reference, prompt, 8))
    for index in range(8):
        await pair.to_prefill.ReleasePrefill(
            prefill_pb2.ReleasePrefillRequest(request_id=f"req-{index}"), timeout=5
        )


async def test_a_request_that_ends_with_its_first_token_is_not_pushed(pair: Pair) -> None:
    prompt = prompt_of(40)
    grant = await pair.reserve(prompt, max_tokens=1)
    out = await pair.run_prefill(pair.prefill_request(prompt, grant, max_tokens=1))
    assert len(out.token_ids) == 1
    assert out.finish_reason == 2
    assert out.done.bytes == 0
    assert pair.prefill.is_clean()
    released = await pair.to_decode.Release(
        decode_pb2.ReleaseRequest(reservation_id=grant.reservation_id), timeout=5
    )
    assert released.released_blocks >= 0
