"""Which memory a push gets, and what becomes of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.core.handoff.frames import Opening, SlotOffer
from baton.core.hashing import Fingerprint, KvLayout
from baton.handoff.transports.shm import SharedInlet, SharedReceiver
from tests.support.shared_memory import num_held

FINGERPRINT = Fingerprint("demo", "c", "w", "t", KvLayout.one_group(4, "float32", (1,), (2,)))


@pytest.fixture
def regions() -> Iterator[SharedReceiver]:
    made = SharedReceiver(1 << 30)
    yield made
    made.close()
    assert num_held() == 0


async def _open(regions: SharedReceiver, sender: str = "p") -> SharedInlet | None:
    opening = Opening("res", "req", 1, 1, FINGERPRINT, sender, transports=("shm",))
    return await regions.inlet(opening, 4)


async def _use(regions: SharedReceiver, sender: str, *, is_settled: bool = True) -> SlotOffer:
    region = await _open(regions, sender)
    assert region is not None
    region.close(is_committed=is_settled)
    assert isinstance(region.offer, SlotOffer)
    return region.offer


async def test_settled_memory_is_for_the_next_push_of_the_same_sender_only(
    regions: SharedReceiver,
) -> None:
    first = await _use(regions, "p")
    assert (await _use(regions, "other")).token != first.token
    region = await _open(regions)
    assert region is not None
    assert region.offer == first
    at_once = await _open(regions)
    assert at_once is not None
    assert at_once.offer != first, "a region serves one push at a time"
    region.close(is_committed=False)
    at_once.close(is_committed=False)


async def test_memory_of_a_push_that_broke_off_is_not_used_again(regions: SharedReceiver) -> None:
    first = await _use(regions, "p", is_settled=False)
    assert num_held() == 0
    assert (await _use(regions, "p")).token != first.token


async def test_idle_memory_is_bounded(regions: SharedReceiver) -> None:
    await _use(regions, "p-0")
    held = num_held()
    for number in range(1, 9):
        await _use(regions, f"p-{number}")
    assert num_held() == 4 * held


async def test_the_budget_is_kept_and_given_back(regions: SharedReceiver) -> None:
    num_bytes = (await _use(regions, "p")).num_bytes
    regions.close()
    regions = SharedReceiver(2 * num_bytes)
    open_now = [await _open(regions, f"p-{number}") for number in range(3)]
    assert open_now[2] is None
    for region in open_now[:2]:
        assert region is not None
        region.close(is_committed=False)
    await _use(regions, "idle-1")
    await _use(regions, "idle-2")
    again = [await _open(regions, f"q-{number}") for number in range(3)]
    assert [region is None for region in again] == [False, False, True], "idle memory makes room"
    for region in again[:2]:
        assert region is not None
        region.close(is_committed=False)
    regions.close()
