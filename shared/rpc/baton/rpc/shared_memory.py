"""Memory that two processes of one machine share: slots that one writes and the other copies from.

It has no name, only a descriptor that the other process opens through /proc: nothing can be left
behind, however a process ends, and only processes of one user (and one pid namespace) get at it.
Its size is sealed, so touching it can never fail.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys
from typing import Annotated

from pydantic import AfterValidator

from baton.core.errors import KvLayoutMismatch
from baton.core.handoff.frames import SLOTS_START_BYTES, SlotOffer

TOKEN_BYTES = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
IS_SUPPORTED = sys.platform == "linux"
_TRANSPORTS = ("nixl", "shm", "grpc")


def parse_transports(text: str) -> tuple[str, ...]:
    """Transports of "shm,grpc", in order.

    Raises:
        ValueError: one is not known or named twice, or the last is not the one that works anywhere.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(_TRANSPORTS) or len(set(names)) != len(names) or names[-1] != "grpc":
        raise ValueError(f"must be some of {', '.join(_TRANSPORTS)}, the last one grpc")
    return names


def _check_transports(text: str) -> str:
    parse_transports(text)
    return text


TransportList = Annotated[str, AfterValidator(_check_transports)]
"""What `parse_transports` takes."""


class ReceiverSlots:
    """The side that made the memory. `close` it on every path."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Makes it; pages are taken as they are written.

        Raises:
            OSError: the system does not give it.
        """
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            token = secrets.token_bytes(TOKEN_BYTES)
            self.offer = SlotOffer(num_slots, slot_bytes, token, os.getpid(), fd)
            os.ftruncate(fd, self.offer.num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            os.pwrite(fd, token, 0)
            self._memory: mmap.mmap | None = mmap.mmap(
                fd, self.offer.num_bytes, prot=mmap.PROT_READ
            )
        except BaseException:
            os.close(fd)
            raise
        self._copy = bytearray()

    def take(self, sequence: int, num_bytes: int) -> memoryview:
        """A copy of what lies in the slot of chunk `sequence`; valid until the next one is taken.

        A sender may write at any time: only the copy can be checked and then used.

        Raises:
            KvLayoutMismatch: it is more than a slot has, or this is closed.
        """
        if self._memory is None or not 0 < num_bytes <= self.offer.slot_bytes:
            raise KvLayoutMismatch(
                f"{num_bytes} bytes are not in a slot of {self.offer.slot_bytes}"
            )
        if len(self._copy) < num_bytes:
            self._copy = bytearray(num_bytes)
        start = SLOTS_START_BYTES + sequence % self.offer.num_slots * self.offer.slot_bytes
        copy = memoryview(self._copy)[:num_bytes]
        copy[:] = memoryview(self._memory)[start : start + num_bytes]
        return copy

    def close(self) -> None:
        """Lets go: what a sender still writes, nobody reads. May be called twice."""
        if self._memory is not None:
            self._memory = None
            os.close(self.offer.fd)


class SenderSlots:
    """The side that writes. The memory lasts as long as anybody holds a view of it."""

    name = "shm"

    def __init__(self, offer: SlotOffer) -> None:
        """Opens a receiver's memory.

        Raises:
            OSError: it is not the receiver's memory that is seen here, or none at all.
        """
        self.offer = offer
        fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not is_sealed or os.fstat(fd).st_size != offer.num_bytes:
                raise OSError(f"descriptor {offer.fd} of process {offer.pid} is something else")
            if os.pread(fd, TOKEN_BYTES, 0) != offer.token:
                raise OSError(f"process {offer.pid} is not the receiver: another token")
            self._memory = memoryview(mmap.mmap(fd, offer.num_bytes))
        finally:
            os.close(fd)

    @property
    def slot_bytes(self) -> int:
        """Bytes per slot."""
        return self.offer.slot_bytes

    def slot(self, sequence: int, num_bytes: int) -> memoryview:
        """Where chunk `sequence` goes. There must be credit for it: then nobody else uses it."""
        start = SLOTS_START_BYTES + sequence % self.offer.num_slots * self.offer.slot_bytes
        return self._memory[start : start + num_bytes]
