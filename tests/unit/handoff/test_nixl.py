"""What a sender says of memory to be read over NIXL, with a stand-in for that library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from baton.core.errors import KvLayoutMismatch
from baton.core.handoff.frames import Staged
from baton.handoff.transports.nixl import NixlReceiver
from tests.support.eventually import eventually

TOKEN = b"t" * 16
GOOD = Staged(b"agent", 4096, 8, 1 << 20, TOKEN)
BUFFER_BYTES = 1 << 20


class _Agent:
    """Reads zeros, after the token; keeps what was asked for."""

    def __init__(self, _name: str, num_bytes: int) -> None:
        self.memory = bytearray(num_bytes)
        self.reads: list[tuple[int, int, int]] = []

    def read(
        self, _peer: bytes, address: int, start: int, num_bytes: int, _timeout_s: float
    ) -> memoryview:
        self.reads.append((address, start, num_bytes))
        content = (TOKEN + bytes(num_bytes))[:num_bytes]
        self.memory[start : start + num_bytes] = content
        return memoryview(self.memory)[start : start + num_bytes]


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> Iterator[NixlReceiver]:
    monkeypatch.setattr("baton.handoff.transports.nixl.NixlAgent", _Agent)
    pulls = NixlReceiver(0)
    yield pulls
    pulls.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": b""},
        {"token": TOKEN * (1 << 17), "slot_bytes": 1 << 30},  # longer than a buffer
        {"slot_bytes": 8},  # shorter than the token
        {"slot_bytes": 0},
        {"num_slots": 0},
        {"address": (1 << 64) - 4096},
        {"num_slots": (1 << 32) - 1, "slot_bytes": (1 << 64) - 1},
        {"agent": b"a" * (1 << 20)},
    ],
    ids=range(8),
)
async def test_memory_that_cannot_be_is_not_read(
    pulls: NixlReceiver, wrong: dict[str, object]
) -> None:
    num_free = len(pulls.free)
    with pytest.raises(OSError, match="not one that can be read"):
        await pulls.open(replace(GOOD, **wrong))  # type: ignore[arg-type]
    agent: object = pulls.agent
    assert isinstance(agent, _Agent)
    assert agent.reads == []
    assert len(pulls.free) == num_free


async def test_memory_with_another_token_is_not_used(pulls: NixlReceiver) -> None:
    num_free = len(pulls.free)
    with pytest.raises(OSError, match="another token"):
        await pulls.open(replace(GOOD, token=b"u" * 16))
    await eventually(lambda: len(pulls.free) == num_free)


async def test_a_chunk_is_read_from_its_slot_into_the_buffer_of_its_push(
    pulls: NixlReceiver,
) -> None:
    first, second = await pulls.open(GOOD), await pulls.open(GOOD)
    assert first is not None
    assert second is not None
    await first.take(9, BUFFER_BYTES)
    agent: object = pulls.agent
    assert isinstance(agent, _Agent)
    assert agent.reads[-1] == (GOOD.address + GOOD.slot_bytes, first.start, BUFFER_BYTES)
    assert abs(first.start - second.start) >= BUFFER_BYTES
    for num_bytes in (0, BUFFER_BYTES + 1):
        with pytest.raises(KvLayoutMismatch):
            await first.take(0, num_bytes)


async def test_a_sender_that_is_silent_costs_one_buffer_and_no_more(
    pulls: NixlReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object) -> memoryview:
        raise TimeoutError("nothing was read")

    num_free = len(pulls.free)
    other = replace(GOOD, agent=b"another agent")
    with monkeypatch.context() as patch:
        patch.setattr(_Agent, "read", silent)
        with pytest.raises(OSError, match="nothing was read"):
            await pulls.open(GOOD)
        await eventually(lambda: GOOD.agent in pulls.silent)
        with pytest.raises(OSError, match="not read in time before"):
            await pulls.open(GOOD)
    region = await pulls.open(other)
    assert region is not None
    region.close(is_committed=False)
    await eventually(lambda: len(pulls.free) == num_free - 1)
