"""Memory that chunks wait in until a decode worker has read them over NIXL.

A push leases slots and gives them back when it ends, however it does. A receiver that reads later
reads another push's chunks, for a push of its own that is over: it drops them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.handoff.frames import Staged
from baton.rpc.nixl import NixlAgent

_NUM_SLOTS = 8
_SLOT_BYTES = 1 << 20
_NUM_LEASES = 8
_TOKEN_BYTES = 16


@dataclass(slots=True)
class StagedSlots:
    """One push's slots."""

    name = "nixl"
    agent: NixlAgent
    start: int
    staged: Staged
    give_back: Callable[[int], None]

    @property
    def slot_bytes(self) -> int:
        """Bytes per slot."""
        return _SLOT_BYTES

    def slot(self, sequence: int, num_bytes: int) -> memoryview:
        """Where chunk `sequence` goes."""
        return self.agent.view(self.start + sequence % _NUM_SLOTS * _SLOT_BYTES, num_bytes)

    def close(self) -> None:
        """Gives the slots back; call it once."""
        self.give_back(self.start)


class Staging:
    """All slots of this worker."""

    def __init__(self) -> None:
        """Takes about half a second.

        Raises:
            OSError: NIXL does not work here.
        """
        num_bytes = _NUM_SLOTS * _SLOT_BYTES
        name = f"baton-prefill-{secrets.token_hex(8)}"
        self._agent = NixlAgent(name, _NUM_LEASES * num_bytes)
        self._free = [number * num_bytes for number in range(_NUM_LEASES)]

    def lease(self) -> StagedSlots | None:
        """Slots for a push; None when all are leased."""
        if not self._free:
            return None
        start = self._free.pop()
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._agent.view(start, _TOKEN_BYTES)[:] = token
        address = self._agent.address + start
        staged = Staged(self._agent.metadata, address, _NUM_SLOTS, _SLOT_BYTES, token)
        return StagedSlots(self._agent, start, staged, self._free.append)
