"""Several outputs of one prompt: it is computed and sent once, and shared where they decode."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import KvCacheFull, NoWorker
from baton.v1 import decode_pb2
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.gateway_rig import running_gateway
from tests.support.scheduler_rig import Answer, Rig
from tests.support.tiny_models import make_tiny_model
from tests.support.workers import worker_pair

NUM_CHOICES = 4


async def _ask_for_choices(rig: Rig, **fields: Any) -> list[asyncio.Task[Answer]]:
    first = asyncio.create_task(rig.ask(request_id="first", **fields))
    await eventually(lambda: rig.tokenizers[0].encoded)
    return [first] + [
        asyncio.create_task(rig.ask(request_id=f"choice-{index}", fork_of="first", **fields))
        for index in range(1, NUM_CHOICES)
    ]


async def test_only_the_first_choice_goes_through_prefill() -> None:
    async with Rig(num_decode=2) as rig:
        rig.prefills[0].pauses.hold("transfer")
        tasks = await _ask_for_choices(rig)
        await eventually(lambda: len(rig.tokenizers[0].encoded) == NUM_CHOICES)
        await eventually(lambda: "transfer" in rig.prefills[0].pauses.reached)
        assert sum(len(decode.orders) for decode in rig.decodes) == 1, "the others wait"
        rig.prefills[0].pauses.let_go("transfer")
        answers = await asyncio.gather(*tasks)
        assert {answer.text for answer in answers} == {expected_text("hello", 8)}
        assert len(rig.prefills[0].orders) == 1
        assert len({answer.last.placement.decode_worker_id for answer in answers}) == 1
        for answer in answers[1:]:
            assert answer.last.placement.reason == "shared_prompt"
            assert answer.last.placement.local_prefill
        orders = [order for decode in rig.decodes for order in decode.orders]
        (first,) = [order.request_id for order in orders if order.request_id.endswith(".first")]
        assert sorted(order.fork_of for order in orders) == ["", *[first] * (NUM_CHOICES - 1)]
        await eventually(rig.nothing_held)


async def test_choices_go_their_own_way_when_the_first_one_fails() -> None:
    async with Rig(max_attempts=1) as rig:
        rig.prefills[0].pauses.hold("compute")
        rig.prefills[0].error = NoWorker("the prefill worker fell over")
        tasks = await _ask_for_choices(rig)
        await eventually(lambda: "compute" in rig.prefills[0].pauses.reached)
        rig.prefills[0].fail_at = "compute"
        rig.prefills[0].pauses.let_go("compute")
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, Exception)
        for answer in others:
            assert isinstance(answer, Answer)
            assert answer.text == expected_text("hello", 8)
            assert answer.last.placement.reason != "shared_prompt"
        await eventually(rig.nothing_held)


async def test_a_choice_goes_elsewhere_when_there_is_no_room_beside_the_first() -> None:
    async with Rig(num_decode=2) as rig:
        rig.decodes[0].pauses.hold("token 3")
        rig.decodes[1].pauses.hold("token 3")
        first = asyncio.create_task(rig.ask(request_id="first"))
        await eventually(lambda: any("token 3" in d.pauses.reached for d in rig.decodes))
        (home,) = [decode for decode in rig.decodes if "token 3" in decode.pauses.reached]
        (other,) = [decode for decode in rig.decodes if decode is not home]
        home.refuse = lambda: KvCacheFull("full", retry_after_s=0.1)
        other.pauses.let_go("token 3")
        answer = await rig.ask(request_id="second", fork_of="first")
        assert answer.text == expected_text("hello", 8)
        assert not other.orders[-1].fork_of
        home.pauses.let_go("token 3")
        await first


@pytest.mark.parametrize(
    "fields",
    [
        {"fork_of": "nobody"},
        {"fork_of": "first", "cache_salt": "other"},
        {"fork_of": "first", "prompt": "another prompt"},
        {"fork_of": "first", "sampling": {"prompt_logprobs": 1}},
    ],
)
async def test_what_is_not_the_same_prompt_is_not_shared(fields: dict[str, Any]) -> None:
    async with Rig() as rig:
        rig.decodes[0].pauses.hold("token 3")
        first = asyncio.create_task(rig.ask(request_id="first"))
        await eventually(lambda: "token 3" in rig.decodes[0].pauses.reached)
        second = asyncio.create_task(rig.ask(request_id="second", **fields))
        await eventually(lambda: len(rig.decodes[0].orders) == 2)
        assert not rig.decodes[0].orders[-1].fork_of
        rig.decodes[0].pauses.let_go("token 3")
        answers = await asyncio.gather(first, second)
        assert answers[1].last.placement.reason != "shared_prompt"


async def test_the_gateway_names_the_first_choice_of_each_prompt() -> None:
    async with running_gateway() as edge:
        await edge.client.completions.create(
            model="demo", prompt=["one", "two"], n=3, seed=5, max_tokens=2
        )
        requests = sorted(edge.fake.requests, key=lambda request: request.request_id)
        first, _, _, second, _, _ = [request.request_id for request in requests]
        origins = [request.fork_of for request in requests]
        assert origins == ["", first, first, "", second, second]
        assert [request.sampling.seed for request in requests] == [5, 6, 7] * 2


async def test_four_choices_transfer_as_much_as_one(tmp_path: Path) -> None:
    prompt = [(index * 37 + 5) % 256 for index in range(100)]
    sampling = {"temperature": 1.0, "max_tokens": 12}
    async with worker_pair(make_tiny_model("llama", tmp_path)) as pair:
        alone = [
            await pair.generate(prompt, f"alone-{index}", seed=index, **sampling)
            for index in range(NUM_CHOICES)
        ]
    async with worker_pair(tmp_path) as pair:
        grant = await pair.reserve(prompt, "first", seed=0, **{**sampling, "max_tokens": 100})
        request = pair.prefill_request(prompt, grant, "first", seed=0, **sampling)
        first = await pair.run_prefill(request)
        reading = asyncio.create_task(pair.run_decode(grant, first))
        await eventually(lambda: pair.decode.service.snapshot().num_running == 1)
        num_bytes = pair.decode.service.loaded().intake.num_bytes
        assert (
            num_bytes == 7 * pair.decode.service.loaded().host.engine.fingerprint.layout.block_bytes
        )
        for index in range(1, NUM_CHOICES):
            asked = {"temperature": 1.0, "max_tokens": 12, "seed": index, "ignore_eos": True}
            choice = await pair.to_decode.Reserve(
                decode_pb2.ReserveRequest(
                    request_id=f"choice-{index}",
                    attempt=1,
                    token_ids=prompt,
                    sampling=asked,
                    fork_of="first",
                ),
                timeout=20,
            )
            assert choice.num_cached_blocks == 6
            out = await pair.run_decode(choice, local_prefill=True)
            assert out.token_ids == alone[index].token_ids
            assert out.timings.cached_tokens == 99
        await reading
        assert first.token_ids[:12] == alone[0].token_ids
        assert pair.decode.service.loaded().intake.num_bytes == num_bytes
        stats = pair.decode.service.snapshot().stats
        assert (stats["forks"], stats["copied_blocks"]) == (3, 3)
        await eventually(pair.decode.is_clean)
