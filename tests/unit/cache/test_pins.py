"""Pins: bounded in bytes, number and time, and over a restart."""

from __future__ import annotations

import json

import pytest

from baton.cache.pins import MAX_PINS, Pins
from baton.core.errors import InvalidRequest, KvCacheFull
from baton.core.eviction import FIRST_LINK, EvictionOrder
from tests.support.kv_blocks import name

PREFIX = [name(number) for number in range(1, 5)]


class Held:
    def __init__(self, limit_bytes: int = 1000) -> None:
        self.now = 100.0
        self.orders = [EvictionOrder(), EvictionOrder()]
        self.pins = Pins(limit_bytes, lambda: self.orders, lambda: self.now)

    def evicted(self) -> list[bytes]:
        """What each tier gives up of the prefix, put there anew."""
        gone = set()
        for order in self.orders:
            order.clear()
            for block_hash in PREFIX:
                order.add(block_hash, FIRST_LINK, cost=1.0, num_bytes=1)
            while (victim := order.evict()) is not None:
                gone.add(victim)
        return sorted(gone)


def test_pinned_prefix_stays_in_every_tier_until_its_time_is_over() -> None:
    held = Held()
    pin = held.pins.pin(PREFIX[:3], 100, ttl_s=10.0, label="system prompt")
    assert (pin.label, pin.num_bytes, held.pins.remaining_s(pin)) == ("system prompt", 300, 10.0)
    assert held.evicted() == PREFIX[3:]
    held.now += 10.0
    assert held.pins.expire()
    assert not held.pins.expire()
    assert held.pins.current() == []
    assert held.evicted() == PREFIX


def test_pin_can_be_taken_back_once() -> None:
    held = Held()
    pin = held.pins.pin(PREFIX, 100, ttl_s=10.0, label="")
    assert held.pins.unpin(pin.pin_id)
    assert not held.pins.unpin(pin.pin_id)
    assert held.evicted() == PREFIX
    assert held.pins.used_bytes == 0


def test_same_prefix_again_renews_its_pin() -> None:
    held = Held(limit_bytes=400)
    first = held.pins.pin(PREFIX, 100, ttl_s=10.0, label="old")
    held.now += 5.0
    again = held.pins.pin(PREFIX, 100, ttl_s=10.0, label="new")
    assert again.pin_id == first.pin_id
    assert held.pins.current() == [again]
    held.pins.unpin(again.pin_id)
    assert held.evicted() == PREFIX


def test_shared_start_stays_while_any_pin_holds_it() -> None:
    held = Held()
    whole = held.pins.pin(PREFIX, 100, ttl_s=10.0, label="")
    held.pins.pin(PREFIX[:2], 100, ttl_s=10.0, label="")
    held.pins.unpin(whole.pin_id)
    assert held.evicted() == PREFIX[2:]


def test_limits_hold() -> None:
    held = Held(limit_bytes=500)
    held.pins.pin(PREFIX, 100, ttl_s=10.0, label="")
    with pytest.raises(KvCacheFull, match="100 of 500"):
        held.pins.pin([name(9), name(10)], 100, ttl_s=10.0, label="")
    held.now += 11.0
    held.pins.pin([name(9), name(10)], 100, ttl_s=10.0, label="")
    many = Held(limit_bytes=1 << 30)
    for number in range(MAX_PINS):
        many.pins.pin([name(number)], 1, ttl_s=10.0, label="")
    with pytest.raises(KvCacheFull):
        many.pins.pin([name(MAX_PINS)], 1, ttl_s=10.0, label="")


@pytest.mark.parametrize(
    ("ttl_s", "label", "block_bytes"),
    [(0.0, "", 1), (1e9, "", 1), (float("nan"), "", 1), (1.0, "x" * 129, 1), (1.0, "", 0)],
)
def test_values_out_of_range_are_refused(ttl_s: float, label: str, block_bytes: int) -> None:
    with pytest.raises(InvalidRequest):
        Held().pins.pin(PREFIX, block_bytes, ttl_s=ttl_s, label=label)


def test_pins_last_over_a_restart_for_what_is_left_of_their_time() -> None:
    before = Held()
    before.pins.pin(PREFIX[:1], 100, ttl_s=10.0, label="short")
    pin = before.pins.pin(PREFIX[:2], 100, ttl_s=60.0, label="long")
    dumped = json.loads(json.dumps(before.pins.dump()))
    after = Held()
    after.now += 30.0
    after.pins.load(dumped)
    assert after.pins.current() == [pin]
    assert after.pins.remaining_s(pin) == 30.0
    assert after.evicted() == PREFIX[2:]
