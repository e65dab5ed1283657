"""Chunks that this worker reads from senders' memory over NIXL, into buffers of its own."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.core.errors import KvLayoutMismatch, KvTransferLost
from baton.core.handoff.frames import PullOffer, Staged
from baton.rpc.nixl import NixlAgent

_BUFFER_BYTES = 1 << 20
_NUM_BUFFERS = 16
_READ_TIMEOUT_S = 5.0
_MAX_AGENT_BYTES = 64 << 10
_MAX_ADDRESS = 1 << 64


class Pulls:
    """The agent, its thread, and the buffers that pushes have."""

    def __init__(self) -> None:
        """Takes about half a second.

        Raises:
            OSError: NIXL does not work here.
        """
        name = f"baton-decode-{secrets.token_hex(8)}"
        self.agent = NixlAgent(name, _NUM_BUFFERS * _BUFFER_BYTES)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="baton-nixl")
        self.free = [number * _BUFFER_BYTES for number in range(_NUM_BUFFERS)]
        """Where buffers begin that no push has."""
        self.silent: set[bytes] = set()
        """Agents that were not read in time. Each time costs a buffer, so they are left alone."""

    async def open(self, staged: Staged) -> PullRegion | None:
        """A region for a push; None when all buffers are in use.

        Raises:
            OSError: the sender's memory cannot be read, cannot exist, or is not what it says.
        """
        _check(staged)
        if staged.agent in self.silent:
            raise OSError("the sender's memory was not read in time before")
        if not self.free:
            return None
        region = PullRegion(self, staged, self.free.pop())
        with ExitStack() as stack:
            stack.callback(region.close)
            if await region.read(0, len(staged.token)) != staged.token:
                raise OSError("the memory read is not the sender's: another token")
            stack.pop_all()
        return region


@dataclass(slots=True)
class PullRegion:
    """One push's buffer: only this worker ever writes to it. `close` it on every path."""

    pulls: Pulls
    staged: Staged
    start: int
    is_settled: bool = False
    """The push was committed."""
    _reading: asyncio.Future[memoryview] | None = field(default=None, init=False)

    @property
    def offer(self) -> PullOffer:
        """What the sender is told."""
        return PullOffer(self.staged.num_slots, self.staged.slot_bytes)

    async def take(self, sequence: int, num_bytes: int) -> memoryview:
        """The chunk, read from the sender's slot; valid until the next one is taken.

        Raises:
            KvLayoutMismatch: it is more than a slot or a buffer has.
            KvTransferLost: it could not be read.
        """
        if not 0 < num_bytes <= min(self.staged.slot_bytes, _BUFFER_BYTES):
            raise KvLayoutMismatch(f"{num_bytes} bytes are not in a slot")
        try:
            start = sequence % self.staged.num_slots * self.staged.slot_bytes
            return await self.read(start, num_bytes)
        except OSError as error:
            raise KvTransferLost(f"a chunk could not be read: {error}") from error

    async def read(self, start: int, num_bytes: int) -> memoryview:
        """Bytes of the sender's memory. When this is cancelled the read goes on: see `close`.

        Raises:
            OSError: they could not be read.
        """
        address = self.staged.address + start
        arguments = self.staged.agent, address, self.start, num_bytes, _READ_TIMEOUT_S
        self._reading = asyncio.get_running_loop().run_in_executor(
            self.pulls.thread, self.pulls.agent.read, *arguments
        )
        return await asyncio.shield(self._reading)

    def close(self) -> None:
        """Gives the buffer back once nothing is read into it any more."""
        if self._reading is None:
            self.pulls.free.append(self.start)
        else:
            self._reading.add_done_callback(self._after_read)

    def _after_read(self, done: asyncio.Future[memoryview]) -> None:
        # A read that was given up may still arrive: its buffer is not used again.
        if isinstance(done.exception(), TimeoutError):
            self.pulls.silent.add(self.staged.agent)
        else:
            self.pulls.free.append(self.start)


def _check(staged: Staged) -> None:
    """Checks what a sender says: the token is read into a buffer as long as any chunk's.

    Raises:
        OSError: no memory is like that.
    """
    num_bytes = staged.num_slots * staged.slot_bytes
    is_range = num_bytes > 0 and staged.address + num_bytes <= _MAX_ADDRESS
    is_token = 0 < len(staged.token) <= min(staged.slot_bytes, _BUFFER_BYTES)
    if not (is_range and is_token and len(staged.agent) <= _MAX_AGENT_BYTES):
        raise OSError("the staged memory is not one that can be read")
