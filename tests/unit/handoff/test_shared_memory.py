from __future__ import annotations

import os
from dataclasses import replace
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, fcntl
from pathlib import Path

import pytest

from baton.core.errors import KvLayoutMismatch
from baton.handoff.transports.registry import parse_transports
from baton.handoff.transports.shm import ReceiverSlots, SenderSlots
from tests.support.shared_memory import num_held


def test_a_chunk_goes_through_the_slot_of_its_sequence_number() -> None:
    receiver = ReceiverSlots(3, 4096)
    sender = SenderSlots(receiver.offer)
    for sequence in range(7):
        sender.slot(sequence, 5)[:] = b"kv%03d" % sequence
        assert receiver.take(sequence, 5) == b"kv%03d" % sequence
    receiver.close()


def test_what_is_taken_does_not_change_when_the_sender_writes_again() -> None:
    receiver = ReceiverSlots(1, 4096)
    sender = SenderSlots(receiver.offer)
    sender.slot(0, 4)[:] = b"good"
    taken = receiver.take(0, 4)
    sender.slot(0, 4)[:] = b"late"
    assert taken == b"good"
    receiver.close()


def test_nothing_is_taken_beyond_a_slot_or_after_the_end() -> None:
    receiver = ReceiverSlots(2, 4096)
    for num_bytes in (0, 4097):
        with pytest.raises(KvLayoutMismatch, match="not in a slot of 4096"):
            receiver.take(0, num_bytes)
    receiver.close()
    receiver.close()
    with pytest.raises(KvLayoutMismatch, match="not in a slot"):
        receiver.take(0, 1)


def test_a_sender_opens_only_the_memory_that_was_meant(tmp_path: Path) -> None:
    receiver = ReceiverSlots(1, 4096)
    offer = receiver.offer
    with pytest.raises(OSError, match="another token"):
        SenderSlots(replace(offer, token=bytes(16)))
    with pytest.raises(OSError, match="something else"):
        SenderSlots(replace(offer, num_slots=2))
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(offer.num_bytes)
        # Not sealed: it could shrink under the writer.
        with pytest.raises(OSError, match=r"Invalid argument|something else"):
            SenderSlots(replace(offer, fd=file.fileno()))
    for seals in (0, F_SEAL_SHRINK | F_SEAL_GROW):  # not sealed, or not for good
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, offer.num_bytes)
        os.pwrite(fd, offer.token, 0)
        fcntl(fd, F_ADD_SEALS, seals)
        with pytest.raises(OSError, match="something else"):
            SenderSlots(replace(offer, fd=fd))
        os.close(fd)
    receiver.close()
    with pytest.raises(FileNotFoundError):
        SenderSlots(offer)


def test_the_memory_is_gone_once_nobody_uses_it() -> None:
    assert num_held() == 0
    receiver = ReceiverSlots(1, 4096)
    sender: SenderSlots | None = SenderSlots(receiver.offer)
    assert num_held() > 0
    receiver.close()
    sender = None
    assert sender is None
    assert num_held() == 0


def test_the_order_of_transports() -> None:
    assert parse_transports("shm, grpc") == ("shm", "grpc")
    assert parse_transports("grpc") == ("grpc",)
    for text in ("", "shm", "grpc,shm", "rdma,grpc", "grpc,grpc"):
        with pytest.raises(ValueError, match="the last one grpc"):
            parse_transports(text)
