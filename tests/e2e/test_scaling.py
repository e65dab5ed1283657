"""Several prefill and several decode workers share the work, and leave without losing any."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.system import System
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from baton.client import Completion

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


class RoundRobinSystem(System):
    """Takes the workers in turn, so that a test can say where requests go."""

    def scheduler_settings(self) -> dict[str, object]:
        return {"force_disaggregation": "true", "placement_policy": "round_robin"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    async with RoundRobinSystem(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        await running.workers("llama", prefill=2, decode=2)
        yield running


async def generate(system: System, number: int, max_tokens: int = 8) -> Completion:
    prompt = [9 + (number * 53 + index * 7) % 300 for index in range(40)]
    return await system.client.generate(
        token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        return_token_ids=True,
        explain=True,
    )


async def test_all_workers_take_part_and_agree(system: System) -> None:
    first = await asyncio.gather(*(generate(system, number) for number in range(8)))
    again = await asyncio.gather(*(generate(system, number) for number in reversed(range(8))))
    assert [c.token_ids for c in first] == [c.token_ids for c in reversed(again)]
    placements = [c.placement for c in (*first, *again)]
    assert len({placement.prefill_worker_id for placement in placements}) == 2
    assert len({placement.decode_worker_id for placement in placements}) == 2
    await system.assert_nothing_held()


async def test_workers_that_drain_lose_no_request(system: System) -> None:
    running = [asyncio.create_task(generate(system, number, 150)) for number in range(8)]
    leaving = [p for p in system.processes if p.role in {"prefill", "decode"}][::2]
    for process in leaving:
        while not (await system.service_status(process)).num_requests_running:
            assert not all(task.done() for task in running)
            await asyncio.sleep(0.005)
    await system.retire(*leaving)
    completions = await asyncio.gather(*running)
    assert [len(c.token_ids) for c in completions] == [150] * 8
    await system.assert_nothing_held()
