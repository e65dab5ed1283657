"""With NATS killed the system goes on; when it returns, membership mends itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from baton.core.cluster import ServiceState
from tests.support.eventually import eventually
from tests.support.system import System, collect
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.timeout(150), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    async with System(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        await running.workers("llama")
        yield running


async def generate(system: System) -> list[int]:
    stream = system.client.generate(
        token_ids=list(range(9, 99)),
        max_tokens=8,
        temperature=0.0,
        ignore_eos=True,
        return_token_ids=True,
        stream=True,
    )
    return await collect(stream)


async def test_requests_go_on_without_the_broker_and_membership_recovers(system: System) -> None:
    expected = await generate(system)
    system.kill_nats()

    async def bus_is(connected: bool) -> bool:
        return (await system.client.status()).bus_connected is connected

    await eventually(lambda: bus_is(False), timeout_s=10)
    # Longer than any membership lease: nobody may be forgotten because the broker is away.
    for _ in range(5):
        assert await generate(system) == expected
        await eventually(lambda: bus_is(False), timeout_s=5)
    (decode,) = [p for p in system.processes if p.role == "decode"]
    newcomer = await system.worker("decode", "llama")
    await system.wait_ready(newcomer)
    assert await generate(system) == expected

    system.start_nats()
    await eventually(lambda: bus_is(True), timeout_s=20)
    await system.wait_members(newcomer)
    await system.retire(decode)
    assert await generate(system) == expected

    async def knows_only_the_newcomer() -> bool:
        # The one that left may have had no broker yet to say goodbye through: then it is "lost".
        services = (await system.client.status()).services
        serving = [
            s.worker_id for s in services if s.role == "decode" and s.state is not ServiceState.LOST
        ]
        return serving == [newcomer.worker_id]

    await eventually(knows_only_the_newcomer, timeout_s=10)
    await system.assert_nothing_held()
