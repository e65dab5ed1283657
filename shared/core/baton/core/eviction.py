"""Which stored block is given up first: by recency, recompute cost and size, ends of chains first.

Source: GreedyDual-Size-Frequency, L. Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs HPL-98-69R1, 1998: the priority of a block is
`clock + uses * cost / size`, and the clock is the priority of the last block given up, so unused
blocks fall behind. In addition, a block is useless without those before it in its chain. So only
blocks that no present block continues are candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

ATTENTION_TOKENS = 16384
"""Context at which attention over it costs about as much as a token's other layers.

Per token that is 2 operations per weight, about 24 * layers * hidden^2, against 4 * layers * hidden
per token of context: equal at 6 * hidden tokens. Taken for a hidden size between 2048 and 4096.
"""


@dataclass(frozen=True, slots=True)
class ChainLink:
    """A block's place in its chain."""

    parent: bytes = b""
    """Hash of the block before it; empty for the first one, or where it is not known."""
    position: int = 0
    """Blocks before it."""


FIRST_LINK = ChainLink()


def recompute_cost(position: int, block_size: int) -> float:
    """What computing a block again costs, in tokens without context."""
    return block_size * (1.0 + position * block_size / ATTENTION_TOKENS)


@dataclass(slots=True)
class _Entry:
    link: ChainLink
    value: float
    """Recompute cost per byte."""
    uses: int
    priority: float
    turn: int
    """Marks the one item in the heap that counts."""


class EvictionOrder:
    """The blocks of one tier. Not thread-safe. `evict` takes amortised logarithmic time."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._num_children: Counter[tuple[bytes, int]] = Counter()
        """By parent and its position: a link only counts where positions agree, so that no made-up
        circle of parents can keep its blocks for ever."""
        self._pins: Counter[bytes] = Counter()
        self._clock = 0.0
        self._turn = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def has_parent(self, link: ChainLink) -> bool:
        """True when the block before is here, or there is none."""
        if link.position == 0 or not link.parent:
            return True
        parent = self._entries.get(link.parent)
        return parent is not None and parent.link.position == link.position - 1

    def add(self, key: bytes, link: ChainLink, *, cost: float, num_bytes: int) -> None:
        """Takes in a block that is not here yet."""
        value = cost / max(1, num_bytes)
        self._entries[key] = _Entry(link, value, 1, self._clock + value, 0)
        if link.parent:
            self._num_children[link.parent, link.position - 1] += 1
        self._offer(key)

    def use(self, key: bytes) -> None:
        """Notes a use; of a block that is not here it changes nothing."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.uses += 1
            entry.priority = self._clock + entry.uses * entry.value
            self._offer(key)

    def remove(self, key: bytes) -> None:
        """Forgets a block, whatever continues it."""
        link = self._entries.pop(key).link
        if not link.parent:
            return
        child_of = (link.parent, link.position - 1)
        self._num_children[child_of] -= 1
        if not self._num_children[child_of]:
            del self._num_children[child_of]
            if link.parent in self._entries:
                self._offer(link.parent)

    def evict(self, keep: bytes = b"") -> bytes | None:
        """Removes the block that is worth least, and returns it; None when none may go.

        Never one that is pinned, that another one here continues, or `keep`.
        """
        kept: tuple[float, int, bytes] | None = None
        victim: bytes | None = None
        while self._heap and victim is None:
            item = heappop(self._heap)
            key = item[2]
            if not self._is_candidate(key, item[1]):
                continue
            if key == keep:
                kept = item
            else:
                victim = key
                self._clock = max(self._clock, item[0])
        if kept is not None:
            heappush(self._heap, kept)
        if victim is not None:
            self.remove(victim)
        return victim

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keeps blocks from being evicted, present or to come. Pins of one key add up."""
        self._pins.update(keys)

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Takes back one `pin` of each key."""
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]
                if key in self._entries:
                    self._offer(key)

    def clear(self) -> None:
        """Forgets all blocks; pins stay."""
        self._entries.clear()
        self._num_children.clear()
        self._heap.clear()

    def _is_candidate(self, key: bytes, turn: int) -> bool:
        entry = self._entries.get(key)
        return (
            entry is not None
            and entry.turn == turn
            and key not in self._pins
            and not self._num_children.get((key, entry.link.position), 0)
        )

    def _offer(self, key: bytes) -> None:
        """Puts a block into the heap at its present priority, if it may be evicted at all."""
        self._turn += 1
        entry = self._entries[key]
        entry.turn = self._turn
        if not self._is_candidate(key, self._turn):
            return
        heappush(self._heap, (entry.priority, self._turn, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [item for item in self._heap if self._is_candidate(item[2], item[1])]
            heapify(self._heap)
