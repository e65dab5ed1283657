"""Memory shared on one machine: the sender writes into slots and the receiver copies.

The memory has no name, only a descriptor that the sender opens through /proc. So nothing is left
behind, however a process ends, and only processes of one user and pid namespace reach it. Its size
is sealed, so touching it can never fail.

A region serves one push. After a commit it waits for the same sender's next push, because new
memory costs time. After anything else it is dropped: a sender that writes late writes into memory
that no receiver reads.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from baton.core.errors import KvLayoutMismatch
from baton.core.handoff.frames import (
    SLOTS_START_BYTES,
    ChunkFrame,
    KvChunk,
    Offer,
    Opening,
    SlotOffer,
)

logger = logging.getLogger(__name__)
TOKEN_BYTES = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_SLOTS = 4
_SLOT_BYTES = 8 << 20
_MAX_IDLE_LENT = 4
_MAX_IDLE_OPENED = 8
_NOTHING = memoryview(b"")


class ReceiverSlots:
    """Slots in memory that the receiver made. `close` it on every path."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Makes the memory; the system allocates a page when it is first written.

        Raises:
            OSError: the system has no memory for it.
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
        self._copy = np.empty(0, np.uint8)

    def take(self, sequence: int, num_bytes: int) -> memoryview:
        """A copy of the slot of chunk `sequence`, valid until the next one is taken. On any thread.

        A sender may write at any time: only the copy can be checked and then used.

        Raises:
            KvLayoutMismatch: a slot has fewer bytes, or this is closed.
        """
        memory = self._memory
        if memory is None or not 0 < num_bytes <= self.offer.slot_bytes:
            raise KvLayoutMismatch(
                f"{num_bytes} bytes are not in a slot of {self.offer.slot_bytes}"
            )
        if len(self._copy) < num_bytes:
            self._copy = np.empty(num_bytes, np.uint8)
        start = _slot_start(self.offer, sequence)
        copy = self._copy[:num_bytes]
        np.copyto(copy, np.frombuffer(memory, np.uint8, num_bytes, start))
        return copy.data

    def close(self) -> None:
        """Frees the memory: this process reads nothing that a sender writes later. Idempotent."""
        if self._memory is not None:
            self._memory = None
            os.close(self.offer.fd)


class SenderSlots:
    """The same slots at the sender. The memory lasts as long as a view of it."""

    def __init__(self, offer: SlotOffer) -> None:
        """Opens a receiver's memory.

        Raises:
            OSError: this process does not see the receiver's memory.
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

    def slot(self, sequence: int, num_bytes: int) -> memoryview:
        """The slot of chunk `sequence`. Credit for the chunk keeps all others out of it."""
        start = _slot_start(self.offer, sequence)
        return self._memory[start : start + num_bytes]


def _slot_start(offer: SlotOffer, sequence: int) -> int:
    return SLOTS_START_BYTES + sequence % offer.num_slots * offer.slot_bytes


class SharedSender:
    """Regions that receivers lent to this worker."""

    def __init__(self) -> None:
        self.idle: dict[bytes, SenderSlots] = {}
        """Opened before, by token: a receiver offers them again after a commit."""

    def outlet(self) -> SharedOutlet:
        """See SenderEnd."""
        return SharedOutlet(self.idle)

    def close(self) -> None:
        """See SenderEnd."""
        self.idle.clear()


class SharedOutlet:
    """One push into a receiver's slots."""

    def __init__(self, idle: dict[bytes, SenderSlots]) -> None:
        self._idle = idle
        self._slots: SenderSlots | None = None

    def announce(self, opening: Opening) -> Opening:
        """See Outlet: the receiver needs nothing more."""
        return opening

    def accept(self, offer: Offer) -> bool:
        """See Outlet."""
        if not (isinstance(offer, SlotOffer) and offer.num_slots and offer.slot_bytes):
            return False
        self._slots = self._idle.pop(offer.token, None) or SenderSlots(offer)
        return True

    @property
    def max_chunk_bytes(self) -> int:
        """See Outlet."""
        return self._slots.offer.slot_bytes if self._slots is not None else 0

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """See Outlet."""
        return self._slots.slot(sequence, num_bytes) if self._slots is not None else _NOTHING

    def frame(self, chunk: KvChunk, payload: memoryview) -> ChunkFrame:
        """See Outlet."""
        return ChunkFrame(chunk, _NOTHING, payload.nbytes)

    def close(self, *, is_committed: bool) -> None:
        """See Outlet."""
        if self._slots is not None and is_committed:
            self._idle[self._slots.offer.token] = self._slots
            if len(self._idle) > _MAX_IDLE_OPENED:
                self._idle.pop(next(iter(self._idle)))
        self._slots = None


class SharedReceiver:
    """Regions that this worker lends to senders."""

    def __init__(self, max_bytes: int) -> None:
        """Lent and idle memory together never exceed `max_bytes`."""
        self._num_free_bytes = max_bytes
        self._idle: deque[tuple[str, ReceiverSlots]] = deque()
        """Sender and its slots, the longest idle first."""

    async def inlet(self, opening: Opening, num_slots: int) -> SharedInlet | None:
        """See ReceiverEnd."""
        sender = opening.worker_id
        for place, (owner, slots) in enumerate(self._idle):
            if owner == sender:
                del self._idle[place]
                return SharedInlet(self, sender, slots)
        num_slots = min(num_slots, _MAX_SLOTS)
        needed_bytes = SLOTS_START_BYTES + num_slots * _SLOT_BYTES
        while needed_bytes > self._num_free_bytes and self._idle:
            self.drop(self._idle.popleft()[1])
        if needed_bytes > self._num_free_bytes:
            logger.info("no room for a region", extra={"free_bytes": self._num_free_bytes})
            return None
        slots = ReceiverSlots(num_slots, _SLOT_BYTES)
        self._num_free_bytes -= slots.offer.num_bytes
        return SharedInlet(self, sender, slots)

    def keep(self, sender: str, slots: ReceiverSlots) -> None:
        """Keeps slots for the sender's next push; drops the longest idle if too many wait."""
        self._idle.append((sender, slots))
        if len(self._idle) > _MAX_IDLE_LENT:
            self.drop(self._idle.popleft()[1])

    def drop(self, slots: ReceiverSlots) -> None:
        """Frees the memory of slots."""
        slots.close()
        self._num_free_bytes += slots.offer.num_bytes

    def close(self) -> None:
        """See ReceiverEnd."""
        while self._idle:
            self.drop(self._idle.pop()[1])


class SharedInlet:
    """One push out of slots that its sender writes to."""

    def __init__(self, receiver: SharedReceiver, sender: str, slots: ReceiverSlots) -> None:
        self._receiver = receiver
        self._sender = sender
        self._slots = slots

    @property
    def offer(self) -> SlotOffer:
        """See Inlet."""
        return self._slots.offer

    async def take(self, sequence: int, num_bytes: int) -> Callable[[], memoryview]:
        """See Inlet."""
        return partial(self._slots.take, sequence, num_bytes)

    def close(self, *, is_committed: bool) -> None:
        """See Inlet."""
        if is_committed:
            self._receiver.keep(self._sender, self._slots)
        else:
            self._receiver.drop(self._slots)


sender = SharedSender
receiver = SharedReceiver
