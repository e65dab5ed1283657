from __future__ import annotations

import gc
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch

from baton.engine.pages import LargePages

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def _flags(tensor: torch.Tensor) -> list[str]:
    """What /proc tells of the mapping that a tensor lies in."""
    address = tensor.data_ptr()
    is_in = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:
            first, last = (int(part, 16) for part in name.split(" ")[0].split("-"))
            is_in = first <= address < last
        elif is_in and name == "VmFlags":
            return value.split()
    return []


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[mmap.mmap]]:
    made: list[weakref.ref[mmap.mmap]] = []
    real = mmap.mmap

    def recorded(*arguments: int) -> mmap.mmap:
        mapping = real(*arguments)
        made.append(weakref.ref(mapping))
        return mapping

    monkeypatch.setattr(mmap, "mmap", recorded)
    return made


@linux
def test_the_system_is_asked_for_large_pages() -> None:
    pages = LargePages()
    first = pages.empty((3, MIB), torch.bfloat16)
    second = pages.empty((5, 7), torch.int8)
    third = pages.empty((100 * MIB,), torch.uint8)
    assert (first.shape, first.dtype) == ((3, MIB), torch.bfloat16)
    assert (second.shape, second.dtype) == ((5, 7), torch.int8)
    for tensor in (first, third):
        assert tensor.data_ptr() % (2 * MIB) == 0
        assert "hg" in _flags(tensor), "advised"
        assert "sh" not in _flags(tensor), "shared memory has rules of its own"
    assert second.data_ptr() % 64 == 0
    for value, tensor in enumerate((first, second, third)):
        tensor.fill_(value)
    assert [int(tensor.view(-1)[-1]) for tensor in (first, second, third)] == [0, 1, 2]


def test_small_tensors_share_a_chunk_and_the_last_one_lets_it_go(
    mappings: list[weakref.ref[mmap.mmap]],
) -> None:
    pages = LargePages()
    tensors = [pages.empty((MIB,), torch.int8) for _ in range(70)]
    assert len(mappings) == 2
    del pages
    part = tensors[0][5:]
    tensors.clear()
    gc.collect()
    assert mappings[0]() is not None
    assert mappings[1]() is None
    part.fill_(3)
    del part
    gc.collect()
    assert mappings[0]() is None


def test_other_systems_take_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(mmap, "mmap", pytest.fail)
    assert LargePages().empty((4, MIB), torch.int8).shape == (4, MIB)
