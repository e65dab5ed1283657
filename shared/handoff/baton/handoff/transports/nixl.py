"""Memory of another machine, read over NIXL where that library is installed.

Baton reads and never writes: memory that a peer may write to would have to stay out of every other
use for as long as a late writer may live, and nothing says how long that is. So a sender stages
chunks in its memory, which stays registered for the life of its process. The receiver reads them
into its memory on the word of a frame.

One thread makes all calls of an agent, since agents are not thread-safe.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import logging
import mmap
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from baton.core.errors import KvLayoutMismatch, KvTransferLost
from baton.core.handoff.frames import ChunkFrame, KvChunk, Offer, Opening, PullOffer, Staged

_MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
"""The meta package, and what it is made of: one of these is enough, and works without CUDA too."""
_POLL_S = 0.0002
_MAX_PEERS = 256
_SLOT_BYTES = 1 << 20
_NUM_SLOTS = 8
_NUM_LEASES = 8
_TOKEN_BYTES = 16
_NUM_BUFFERS = 16
_READ_TIMEOUT_S = 5.0
_MAX_AGENT_BYTES = 64 << 10
_MAX_ADDRESS = 1 << 64
_NOTHING = memoryview(b"")


class NixlAgent:
    """Registered memory of this process, and reads of that of others. For one thread."""

    def __init__(self, name: str, num_bytes: int) -> None:
        """Takes about half a second; `name` must be unique among all processes that meet.

        Raises:
            OSError: NIXL is not installed, or has no way here.
        """
        self._nixl = _load()
        bindings = self._nixl.nixlBind
        found = (getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
        self._errors: tuple[type[Exception], ...] = (*found, RuntimeError)
        self._memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        """Of the memory, in this process."""
        try:
            self._agent = self._nixl.nixl_agent(
                name, self._nixl.nixl_agent_config(backends=["UCX"])
            )
            self._agent.register_memory([(self.address, num_bytes, 0, "")], "DRAM")
            self.metadata: bytes = self._agent.get_agent_metadata()
            """What others need to read here."""
        except self._errors as error:
            raise OSError(f"NIXL: {error}") from error
        self._peers: dict[bytes, Any] = {}

    def view(self, start: int, num_bytes: int) -> memoryview:
        """A piece of the memory."""
        return memoryview(self._memory)[start : start + num_bytes]

    def read(
        self, peer: bytes, address: int, start: int, num_bytes: int, timeout_s: float
    ) -> memoryview:
        """Reads another process's memory into this one's at `start`.

        Raises:
            OSError: the other process cannot be read.
            TimeoutError: it may still be read later on: the piece must not be used again.
        """
        mine = self._agent.get_xfer_descs([(self.address + start, num_bytes, 0)], "DRAM")
        theirs = self._agent.get_xfer_descs([(address, num_bytes, 0)], "DRAM")
        ends_at_s = time.monotonic() + timeout_s
        try:
            handle = self._agent.initialize_xfer("READ", mine, theirs, self._met(peer))
            state = self._agent.transfer(handle)
            while state == "PROC":
                if time.monotonic() > ends_at_s:
                    raise TimeoutError(f"NIXL read nothing for {timeout_s:g} s")
                time.sleep(_POLL_S)
                state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"reading ended with {state}")
            handle.release()
        except self._errors as error:
            self._forget(peer)
            raise OSError(f"NIXL: {error}") from error
        return self.view(start, num_bytes)

    def _met(self, peer: bytes) -> Any:
        if peer not in self._peers:
            self._peers[peer] = self._agent.add_remote_agent(peer)
            if len(self._peers) > _MAX_PEERS:
                self._forget(next(iter(self._peers)))
        return self._peers[peer]

    def _forget(self, peer: bytes) -> None:
        name = self._peers.pop(peer, None)
        if name is not None:
            try:
                self._agent.remove_remote_agent(name)
            except self._errors:
                logging.getLogger(__name__).info("NIXL no longer knew a process")


def _load() -> ModuleType:
    for name in _MODULES:
        try:
            module = importlib.import_module(f"{name}._api")
        except ImportError:
            continue
        # It writes to stdout through its own handler; this process's log takes warnings only.
        theirs = logging.getLogger("nixl")
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.WARNING)
        return module
    raise OSError("NIXL is not installed: pip install baton-prefill[nixl], baton-decode[nixl]")


class NixlSender:
    """Memory of a sending worker: slots that pushes lease and give back.

    A receiver that reads after its push has ended reads another push's chunks, and drops them.
    """

    def __init__(self) -> None:
        """Takes about half a second.

        Raises:
            OSError: NIXL does not work here.
        """
        num_bytes = _NUM_SLOTS * _SLOT_BYTES
        self.agent = NixlAgent(f"baton-prefill-{secrets.token_hex(8)}", _NUM_LEASES * num_bytes)
        self.free = [number * num_bytes for number in range(_NUM_LEASES)]
        """Where the slots begin that no push has leased."""

    def outlet(self) -> NixlOutlet:
        """See SenderEnd."""
        return NixlOutlet(self)

    def close(self) -> None:
        """See SenderEnd: the memory stays registered for late readers."""


class NixlOutlet:
    """One push's slots, leased if any are free."""

    max_chunk_bytes = _SLOT_BYTES

    def __init__(self, sender: NixlSender) -> None:
        self._sender = sender
        self._start = sender.free.pop() if sender.free else None

    def announce(self, opening: Opening) -> Opening:
        """See Outlet: says where the slots are."""
        if self._start is None:
            return opening
        agent, token = self._sender.agent, secrets.token_bytes(_TOKEN_BYTES)
        agent.view(self._start, _TOKEN_BYTES)[:] = token
        address = agent.address + self._start
        staged = Staged(agent.metadata, address, _NUM_SLOTS, _SLOT_BYTES, token)
        return replace(opening, staged=staged)

    def accept(self, offer: Offer) -> bool:
        """See Outlet."""
        return isinstance(offer, PullOffer) and self._start is not None

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """See Outlet."""
        start = (self._start or 0) + sequence % _NUM_SLOTS * _SLOT_BYTES
        return self._sender.agent.view(start, num_bytes)

    def frame(self, chunk: KvChunk, payload: memoryview) -> ChunkFrame:
        """See Outlet."""
        return ChunkFrame(chunk, _NOTHING, payload.nbytes)

    def close(self, *, is_committed: bool) -> None:  # noqa: ARG002
        """See Outlet."""
        if self._start is not None:
            self._sender.free.append(self._start)
            self._start = None


class NixlReceiver:
    """The agent of a receiving worker, its thread, and the buffers that pushes read into."""

    def __init__(self, max_bytes: int) -> None:  # noqa: ARG002
        """Takes about half a second; senders are lent nothing.

        Raises:
            OSError: NIXL does not work here.
        """
        name = f"baton-decode-{secrets.token_hex(8)}"
        self.agent = NixlAgent(name, _NUM_BUFFERS * _SLOT_BYTES)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="baton-nixl")
        self.free = [number * _SLOT_BYTES for number in range(_NUM_BUFFERS)]
        """Where buffers begin that no push has."""
        self.silent: set[bytes] = set()
        """Agents that were not read in time. Each time costs a buffer, so they are left alone."""

    async def inlet(self, opening: Opening, num_slots: int) -> NixlInlet | None:  # noqa: ARG002
        """See ReceiverEnd; credits may exceed the slots only where the sender has more of them."""
        return await self.open(opening.staged) if opening.staged is not None else None

    async def open(self, staged: Staged) -> NixlInlet | None:
        """A buffer for a push; None when all are in use.

        Raises:
            OSError: the sender's memory cannot be read, cannot exist, or is not what it says.
        """
        _check(staged)
        if staged.agent in self.silent:
            raise OSError("the sender's memory was not read in time before")
        if not self.free:
            return None
        inlet = NixlInlet(self, staged, self.free.pop())
        with ExitStack() as stack:
            stack.callback(inlet.close, is_committed=False)
            if await inlet.read(0, len(staged.token)) != staged.token:
                raise OSError("the memory read is not the sender's: another token")
            stack.pop_all()
        return inlet

    def close(self) -> None:
        """See ReceiverEnd."""
        self.thread.shutdown()


@dataclass(slots=True)
class NixlInlet:
    """One push's buffer: only this worker ever writes to it."""

    receiver: NixlReceiver
    staged: Staged
    start: int
    _reading: asyncio.Future[memoryview] | None = field(default=None, init=False)

    @property
    def offer(self) -> PullOffer:
        """See Inlet."""
        return PullOffer(self.staged.num_slots, self.staged.slot_bytes)

    async def take(self, sequence: int, num_bytes: int) -> Callable[[], memoryview]:
        """See Inlet: reads the chunk from the sender's slot into this push's buffer."""
        if not 0 < num_bytes <= min(self.staged.slot_bytes, _SLOT_BYTES):
            raise KvLayoutMismatch(f"{num_bytes} bytes are not in a slot")
        try:
            start = sequence % self.staged.num_slots * self.staged.slot_bytes
            copy = await self.read(start, num_bytes)
        except OSError as error:
            raise KvTransferLost(f"a chunk could not be read: {error}") from error
        return lambda: copy

    async def read(self, start: int, num_bytes: int) -> memoryview:
        """Bytes of the sender's memory. When this is cancelled the read goes on: see `close`.

        Raises:
            OSError: they could not be read.
        """
        address = self.staged.address + start
        arguments = self.staged.agent, address, self.start, num_bytes, _READ_TIMEOUT_S
        self._reading = asyncio.get_running_loop().run_in_executor(
            self.receiver.thread, self.receiver.agent.read, *arguments
        )
        return await asyncio.shield(self._reading)

    def close(self, *, is_committed: bool) -> None:  # noqa: ARG002
        """See Inlet: gives the buffer back once no read goes into it."""
        if self._reading is None:
            self.receiver.free.append(self.start)
        else:
            self._reading.add_done_callback(self._after_read)

    def _after_read(self, done: asyncio.Future[memoryview]) -> None:
        # A read that was given up may still arrive: its buffer is not used again.
        if isinstance(done.exception(), TimeoutError):
            self.receiver.silent.add(self.staged.agent)
        else:
            self.receiver.free.append(self.start)


def _check(staged: Staged) -> None:
    """Checks what a sender says: the token is read into a buffer as long as any chunk's.

    Raises:
        OSError: no memory is like that.
    """
    num_bytes = staged.num_slots * staged.slot_bytes
    is_range = num_bytes > 0 and staged.address + num_bytes <= _MAX_ADDRESS
    is_token = 0 < len(staged.token) <= min(staged.slot_bytes, _SLOT_BYTES)
    if not (is_range and is_token and len(staged.agent) <= _MAX_AGENT_BYTES):
        raise OSError("the staged memory is not one that can be read")


sender = NixlSender
receiver = NixlReceiver
