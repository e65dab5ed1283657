"""Answers of identical requests, in memory under a byte budget, each for a limited time.

An answer is opaque here. It is verified before it goes, like a block.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from baton.core.answer_key import KEY_BYTES
from baton.core.errors import InvalidRequest

ANSWER_OVERHEAD_BYTES = 512
"""What an answer costs besides its content, roughly."""


@dataclass(frozen=True, slots=True)
class _Kept:
    content: bytes
    checksum: int
    ends_at_s: float

    @property
    def cost_bytes(self) -> int:
        return len(self.content) + ANSWER_OVERHEAD_BYTES


@dataclass(slots=True)
class AnswerCounters:
    """Counted since the start."""

    num_hits: int = 0
    num_misses: int = 0
    num_stored: int = 0
    num_evicted: int = 0
    num_expired: int = 0
    num_corrupt: int = 0


class AnswerStore:
    """Answers by key, the least recently used given up first. The event loop's alone."""

    def __init__(self, budget_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self.budget_bytes = budget_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._ends: deque[tuple[float, bytes]] = deque()
        """In the order in which answers expire, which is that of their coming."""
        self.used_bytes = 0
        self.counters = AnswerCounters()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> bytes | None:
        """The answer, if one is kept.

        Raises:
            InvalidRequest: the key has a wrong length.
        """
        _check(key)
        self._expire()
        kept = self._kept.get(key)
        if kept is not None and xxhash.xxh3_64_intdigest(kept.content) != kept.checksum:
            self.counters.num_corrupt += 1
            self._drop(key)
            kept = None
        if kept is None:
            self.counters.num_misses += 1
            return None
        self.counters.num_hits += 1
        self._kept.move_to_end(key)
        return kept.content

    def put(self, key: bytes, content: bytes) -> bool:
        """Keeps an answer from now on; False when it is larger than the budget.

        Raises:
            InvalidRequest: the key has a wrong length, or the answer is empty.
        """
        _check(key)
        if not content:
            raise InvalidRequest("the answer is empty")
        self._expire()
        if key in self._kept:
            self._drop(key)
        ends_at_s = self._clock() + self._ttl_s
        kept = _Kept(content, xxhash.xxh3_64_intdigest(content), ends_at_s)
        if kept.cost_bytes > self.budget_bytes:
            return False
        while self.used_bytes + kept.cost_bytes > self.budget_bytes:
            self.counters.num_evicted += 1
            self._drop(next(iter(self._kept)))
        self._kept[key] = kept
        self._ends.append((ends_at_s, key))
        self.used_bytes += kept.cost_bytes
        self.counters.num_stored += 1
        return True

    def _expire(self) -> None:
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            ends_at_s, key = self._ends.popleft()
            kept = self._kept.get(key)
            if kept is not None and kept.ends_at_s <= ends_at_s:
                self.counters.num_expired += 1
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.used_bytes -= self._kept.pop(key).cost_bytes
        # Ends of answers that went before their time are left behind; not many more than answers.
        if len(self._ends) > 2 * len(self._kept) + 64:
            self._ends = deque(
                (ends_at_s, other)
                for ends_at_s, other in self._ends
                if other in self._kept and self._kept[other].ends_at_s == ends_at_s
            )


def _check(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidRequest(f"an answer's key has {KEY_BYTES} bytes, got {len(key)}")
