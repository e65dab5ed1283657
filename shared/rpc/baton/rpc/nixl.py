"""Memory that another process reads over NIXL, where that library is installed.

Always reading, never writing: memory that others may write to would have to be kept from every
other use for as long as a late writer may live, and nothing tells how long that is. So a sender
puts chunks into memory of its own, which stays registered for the whole life of its process, and
the receiver reads them into memory of its own, on the word of a frame.

One thread makes all calls of an agent, since agents are not thread-safe.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import mmap
import time
from types import ModuleType
from typing import Any

_MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
"""The meta package, and what it is made of: one of these is enough, and works without CUDA too."""
_POLL_S = 0.0002
_MAX_PEERS = 256


class NixlAgent:
    """Registered memory of this process, and reading that of others."""

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
            TimeoutError: it may still be read later on: the piece must not be used any more.
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
                logging.getLogger(__name__).info("NIXL knew a process no more")


def _load() -> ModuleType:
    for name in _MODULES:
        try:
            module = importlib.import_module(f"{name}._api")
        except ImportError:
            continue
        # It writes to stdout, which is for nobody here, through a handler of its own.
        theirs = logging.getLogger("nixl")
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.WARNING)
        return module
    raise OSError("NIXL is not installed: pip install baton-prefill[nixl], baton-decode[nixl]")
