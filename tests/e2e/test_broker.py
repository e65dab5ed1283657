"""With NATS killed the system goes on; when it returns, membership mends itself."""

from __future__ import annotations

import pytest

from baton.core.cluster import ServiceState
from tests.support.eventually import eventually
from tests.support.system import System

PROMPT = range(9, 99)
pytestmark = [pytest.mark.timeout(150), pytest.mark.asyncio(loop_scope="module")]


async def test_requests_go_on_without_the_broker_and_membership_recovers(system: System) -> None:
    expected = await system.greedy(PROMPT, 8)
    system.kill_nats()

    async def bus_is(connected: bool) -> bool:
        return (await system.client.status()).bus_connected is connected

    await eventually(lambda: bus_is(False), timeout_s=10)
    # Longer than any membership lease: nobody may be forgotten because the broker is away.
    for _ in range(5):
        assert await system.greedy(PROMPT, 8) == expected
        await eventually(lambda: bus_is(False), timeout_s=5)
    (decode,) = [p for p in system.processes if p.role == "decode"]
    newcomer = await system.worker("decode", "llama")
    await system.wait_ready(newcomer)
    assert await system.greedy(PROMPT, 8) == expected

    system.start_nats()
    await eventually(lambda: bus_is(True), timeout_s=20)
    await system.wait_members(newcomer)
    await system.retire(decode)
    assert await system.greedy(PROMPT, 8) == expected

    async def knows_only_the_newcomer() -> bool:
        # The one that left may have had no broker yet to say goodbye through: then it is "lost".
        services = (await system.client.status()).services
        serving = [
            s.worker_id for s in services if s.role == "decode" and s.state is not ServiceState.LOST
        ]
        return serving == [newcomer.worker_id]

    await eventually(knows_only_the_newcomer, timeout_s=10)
    await system.assert_nothing_held()
