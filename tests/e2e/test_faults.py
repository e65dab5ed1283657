"""Processes killed, cancels and deadlines at every state: a clear end, nothing held."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from baton.client import BatonError, DeadlineExceeded
from tests.support.eventually import eventually
from tests.support.shared_memory import mapped
from tests.support.system import Process, System, collect
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT = [9 + (index * 37) % 300 for index in range(400)]
pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    async with System(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        await running.workers("llama", prefill=1, decode=0)
        # Patient, so that a stalled push lasts as long as a test needs it to.
        decode = await running.worker("decode", "llama", progress_timeout_s=60)
        await running.wait_ready(decode)
        await running.wait_members(decode)
        yield running


def options(max_tokens: int) -> dict[str, object]:
    return {
        "token_ids": PROMPT,
        "max_tokens": max_tokens,
        "temperature": 0.8,
        "seed": 7,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


async def faulty(system: System, role: str, fault: str) -> Process:
    """A further worker with a fault."""
    process = await system.worker(role, "llama", fault=fault, progress_timeout_s=60)
    await system.wait_ready(process)
    await system.wait_members(process)
    return process


def of_role(system: System, role: str) -> list[Process]:
    return [p for p in system.processes if p.role == role and p.popen.poll() is None]


async def test_prefill_killed_mid_transfer_is_retried_and_nothing_stays_held(
    system: System,
) -> None:
    names = set(Path("/dev/shm").iterdir())
    expected = await collect(system.client.generate(**options(16)))
    (healthy,) = of_role(system, "prefill")
    (decode,) = of_role(system, "decode")
    stalling = await faulty(system, "prefill", "stall_after_chunk=0")
    await system.retire(healthy)

    request = asyncio.create_task(collect(system.client.generate(**options(16))))

    async def is_filling() -> bool:
        status = await system.service_status(decode)
        return status.kv_blocks["filling"] > 0

    await eventually(is_filling, timeout_s=10)
    replacement = await system.worker("prefill", "llama")
    await system.wait_ready(replacement)
    await system.wait_members(replacement)
    assert await is_filling(), "the transfer ended before the kill"
    shared = mapped(stalling.popen.pid)
    assert shared & mapped(decode.popen.pid), "both see the memory that the push goes through"
    stalling.kill()
    assert await request == expected
    await system.assert_nothing_held()
    await eventually(lambda: not shared & mapped(decode.popen.pid))
    assert set(Path("/dev/shm").iterdir()) <= names


async def test_decode_killed_mid_stream_loses_and_repeats_no_token(system: System) -> None:
    expected = await collect(system.client.generate(**options(200)))
    (first,) = of_role(system, "decode")
    second = await system.worker("decode", "llama")
    await system.wait_ready(second)
    await system.wait_members(second)

    token_ids: list[int] = []
    killed = False
    async for chunk in system.client.generate(**options(200)):
        token_ids.extend(chunk.token_ids)
        if len(token_ids) > 20 and not killed:
            killed = True
            busy = await busy_decode(system, first, second)
            busy.kill()
    assert killed
    assert token_ids == expected
    await system.assert_nothing_held()


async def busy_decode(system: System, *workers: Process) -> Process:
    """The worker that is running the request."""
    for process in workers:
        if (await system.service_status(process)).kv_blocks["in_use"] > 0:
            return process
    raise AssertionError("no decode worker is busy")


async def state_reached(system: System, state: str) -> bool:
    status = await system.client.status()
    return status.requests_by_state.get(state, 0) > 0


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({}, "reserved"),
        ({"fault": "delay_chunk_s=1"}, "prefilling"),
        ({"fault": "stall_after_chunk=0", "progress_timeout_s": 60}, "transferring"),
        ({}, "decoding"),
    ],
    ids=["reserved", "prefilling", "transferring", "decoding"],
)
async def test_cancel_frees_everything(
    system: System, settings: dict[str, object], state: str
) -> None:
    before = of_role(system, "prefill")
    prefill = await system.worker("prefill", "llama", **settings)
    await system.wait_ready(prefill)
    await system.wait_members(prefill)
    await system.retire(*before)
    if state == "reserved":
        # A worker that does not answer is the way to stay in this state.
        prefill.popen.send_signal(signal.SIGSTOP)
    prompt = [9 + (index * 41 + len(state)) % 300 for index in range(400)]
    stream = system.client.generate(**{**options(300), "token_ids": prompt})
    request = asyncio.create_task(collect(stream))
    await eventually(lambda: state_reached(system, state), timeout_s=10)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    prefill.popen.send_signal(signal.SIGCONT)
    await system.assert_nothing_held()
    status = await system.client.status()
    assert sum(status.requests_by_state.values()) == 0
    await system.workers("llama", prefill=1, decode=0)
    await system.retire(prefill)


async def test_expired_deadline_is_a_typed_error_and_frees_everything(system: System) -> None:
    with pytest.raises(DeadlineExceeded):
        await collect(system.client.generate(**options(600), timeout_s=0.3))
    await system.assert_nothing_held()


async def test_corrupt_chunk_costs_one_retry_and_no_wrong_token(system: System) -> None:
    expected = await collect(system.client.generate(**options(16)))
    healthy = of_role(system, "prefill")
    await faulty(system, "prefill", "corrupt_chunk=0")
    await system.retire(*healthy)
    await system.workers("llama", prefill=1, decode=0)
    outputs = [await collect(system.client.generate(**options(16))) for _ in range(4)]
    assert outputs == [expected] * 4
    await system.assert_nothing_held()


async def test_a_request_without_workers_ends_in_a_typed_error(system: System) -> None:
    with pytest.raises(BatonError, match=r"(?i)model"):
        await collect(system.client.generate(token_ids=[9], model="nope", stream=True))
