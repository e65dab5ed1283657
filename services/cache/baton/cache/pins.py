"""Prefixes that are kept whatever comes: named by their hashes, bounded in bytes and in time.

A pin is about hashes, not content: blocks that come later are kept from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.core.errors import InvalidRequest, KvCacheFull
from baton.core.eviction import EvictionOrder

MAX_PINS = 1024
MAX_LABEL_CHARS = 128
MAX_TTL_S = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned prefix."""

    pin_id: str
    """Made of the last block's hash: pinning the same prefix again renews its pin."""
    label: str
    block_hashes: tuple[bytes, ...]
    num_bytes: int
    """Once all of it is stored. Blocks shared with another pin count for both."""
    ends_at_s: float


class Pins:
    """All pins of one replica."""

    def __init__(
        self,
        limit_bytes: int,
        orders: Callable[[], Sequence[EvictionOrder]],
        clock: Callable[[], float],
    ) -> None:
        """`clock` tells wall time, so that pins last over restarts; `orders` are the tiers'."""
        self.limit_bytes = limit_bytes
        self._orders = orders
        self._clock = clock
        self._pins: dict[str, Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def used_bytes(self) -> int:
        """What the pins may take."""
        return sum(pin.num_bytes for pin in self._pins.values())

    def current(self) -> list[Pin]:
        """The pins that hold now."""
        self.expire()
        return list(self._pins.values())

    def remaining_s(self, pin: Pin) -> float:
        """How long a pin still holds."""
        return max(0.0, pin.ends_at_s - self._clock())

    def pin(self, block_hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str) -> Pin:
        """Pins a prefix, or renews its pin.

        Raises:
            InvalidRequest: a value is out of range.
            KvCacheFull: it does not fit what pins may take.
        """
        if not 0.0 < ttl_s <= MAX_TTL_S:
            raise InvalidRequest(f"ttl must be in (0, {MAX_TTL_S:g}] s, got {ttl_s:g}")
        if len(label) > MAX_LABEL_CHARS:
            raise InvalidRequest(f"label must have at most {MAX_LABEL_CHARS} characters")
        if block_bytes < 1:
            raise InvalidRequest(f"block_bytes must be at least 1, got {block_bytes}")
        self.expire()
        pin_id = block_hashes[-1].hex()
        pin = Pin(
            pin_id,
            label,
            tuple(block_hashes),
            len(block_hashes) * block_bytes,
            self._clock() + ttl_s,
        )
        old = self._pins.get(pin_id)
        free_bytes = self.limit_bytes - self.used_bytes + (old.num_bytes if old else 0)
        if pin.num_bytes > free_bytes or (old is None and len(self._pins) >= MAX_PINS):
            raise KvCacheFull(
                f"the prefix takes {pin.num_bytes} bytes and {max(0, free_bytes)} of"
                f" {self.limit_bytes} for pins are free; unpin others first"
            )
        self._add(pin)
        return pin

    def unpin(self, pin_id: str) -> bool:
        """Takes a pin back; False when there is none."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            for order in self._orders():
                order.unpin(pin.block_hashes)
        return pin is not None

    def expire(self) -> bool:
        """Takes back pins whose time is over; True when there were any."""
        now = self._clock()
        over = [pin_id for pin_id, pin in self._pins.items() if pin.ends_at_s <= now]
        for pin_id in over:
            self.unpin(pin_id)
        return bool(over)

    def dump(self) -> list[dict[str, Any]]:
        """All pins, for JSON."""
        return [
            {**asdict(pin), "block_hashes": [name.hex() for name in pin.block_hashes]}
            for pin in self._pins.values()
        ]

    def load(self, dumped: Iterable[dict[str, Any]]) -> None:
        """Takes in pins of before a restart."""
        for fields in dumped:
            hashes = tuple(bytes.fromhex(name) for name in fields["block_hashes"])
            self._add(Pin(**{**fields, "block_hashes": hashes}))
        self.expire()

    def _add(self, pin: Pin) -> None:
        self.unpin(pin.pin_id)
        self._pins[pin.pin_id] = pin
        for order in self._orders():
            order.pin(pin.block_hashes)
