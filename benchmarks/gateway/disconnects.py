"""What is left in a real system after clients that go away at random moments."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from baton.cli.rundir import RunDirectory, SystemState
from baton.core.cluster import ServiceStatus
from baton.core.errors import BatonError
from baton.wire.channel import ChannelPool
from baton.wire.control import RpcControl

START_TIMEOUT_S = 180.0
GRACE_S = 2.0
"""After the last client has gone, nothing may be held for longer."""
NUM_AT_ONCE = 32
_KEPT_STATES = frozenset({"free", "cached"})
_HOLDING_ROLES = frozenset({"gateway", "scheduler", "prefill", "decode"})


@contextmanager
def demo_system(folder: Path) -> Iterator[SystemState]:
    """A whole system with the demo model, by `baton up`."""
    environment = {**os.environ, "BATON_HOME": str(folder)}

    def baton(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "baton.cli.main", *arguments],
            env=environment,
            timeout=START_TIMEOUT_S,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    try:
        baton("up", "--detach")
        state = RunDirectory(folder).running()
        if state is None:
            raise RuntimeError("the system did not start")
        yield state
    finally:
        baton("down")


@dataclass(frozen=True, slots=True)
class Load:
    """What clients ask for before they hang up."""

    num_clients: int = 500
    max_tokens: int = 512
    max_stay_s: float = 1.5
    prompt: str = "class Stack:\n    def push(self, item):\n" * 4
    seed: int = 1


async def disconnect_at_random(address: str, load: Load) -> int:
    """Clients ask, half of them for a stream, and hang up after a random time.

    Returns how many of them had begun to read an answer and not seen its end.
    """
    host, _, port = address.rpartition(":")
    places = asyncio.Semaphore(NUM_AT_ONCE)
    rng = Random(load.seed)

    async def come_and_go(number: int, *, is_stream: bool, stay_s: float) -> bool:
        answer = bytearray()
        async with places:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(_request(f"# {number}\n{load.prompt}", load.max_tokens, is_stream))
                async with asyncio.timeout(stay_s):
                    while part := await reader.read(4096):
                        answer += part
            except TimeoutError:
                pass
            finally:
                writer.transport.abort()
        return is_stream and bool(answer) and b"[DONE]" not in answer

    orders = [
        (rng.random() < 0.5, rng.uniform(0.0, load.max_stay_s)) for _ in range(load.num_clients)
    ]
    cut = await asyncio.gather(
        *(
            come_and_go(number, is_stream=is_stream, stay_s=stay_s)
            for number, (is_stream, stay_s) in enumerate(orders)
        )
    )
    return sum(cut)


def _request(prompt: str, max_tokens: int, is_stream: bool) -> bytes:  # noqa: FBT001
    fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": is_stream, "ignore_eos": True}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    return head.encode() + body


def _held(status: ServiceStatus) -> int:
    blocks = sum(n for state, n in status.kv_blocks.items() if state not in _KEPT_STATES)
    return blocks + status.num_requests_running + status.num_requests_waiting


async def count_held(addresses: list[str], channels: ChannelPool) -> int:
    """Requests and KV blocks that the processes themselves say they hold."""
    control = RpcControl(channels)
    try:
        answers = [await control.status(address, lease_s=1.0) for address in addresses]
    except BatonError as error:
        raise RuntimeError(f"a process does not answer: {error.message}") from error
    return sum(_held(answer.status) for answer in answers)


@dataclass(frozen=True, slots=True)
class Losses:
    """What a system did about clients that went."""

    held: int
    """Requests and KV blocks that its processes still held `GRACE_S` after the last one."""
    released_after_s: float
    """When nothing was held any more, or when waiting ended."""
    cut_streams: int
    """Clients that went in the middle of a streamed answer."""


async def measure_losses(state: SystemState, load: Load) -> Losses:
    """Loses clients, and asks every process until nothing is held or the time is up."""
    gateway = state.process("gateway")
    if gateway is None:
        raise RuntimeError("the system has no gateway")
    holders = [process.address for process in state.processes if process.role in _HOLDING_ROLES]
    cut_streams = await disconnect_at_random(gateway.http_address, load)
    gone_s = time.monotonic()
    channels = ChannelPool(max_message_bytes=1 << 20)
    try:
        while held := await count_held(holders, channels):
            if time.monotonic() - gone_s >= GRACE_S:
                break
            await asyncio.sleep(0.05)
    finally:
        await channels.close()
    return Losses(held, time.monotonic() - gone_s, cut_streams)
