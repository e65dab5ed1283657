"""HTTP clients that go away at random moments leave nothing behind in a whole system."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.gateway.disconnects import Load, disconnect_at_random
from tests.support.eventually import eventually
from tests.support.system import System
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

LOAD = Load(num_clients=48, max_tokens=1500, max_stay_s=0.6)


@pytest.mark.timeout(120)
async def test_clients_that_hang_up_leave_no_request_and_no_block(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "models" / "llama")
    async with System(tmp_path / "system", {"llama": path}) as system:
        await system.workers("llama")
        gateway = system.spawn("gateway", http_port=0)
        await system.wait_ready(gateway)
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        [address] = [line["http_address"] for line in lines if "http_address" in line]
        cut_streams = await disconnect_at_random(address, LOAD)
        assert cut_streams > 0  # or none of them was in the middle of anything
        await system.assert_nothing_held()

        async def is_idle() -> bool:
            return [await _num_requests(system, process) for process in system.processes] == [
                0 for _ in system.processes
            ]

        await eventually(is_idle, timeout_s=2.0)


async def _num_requests(system: System, process: object) -> int:
    status = await system.service_status(process)  # type: ignore[arg-type]
    return int(status.num_requests_running + status.num_requests_waiting)
