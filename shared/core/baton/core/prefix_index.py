"""Which worker holds which KV blocks, kept current from sequenced events.

The scheduler (placement) and the cache service each feed one from `baton.kv.*`. An index is a
hint: a worker that has evicted a block since is found out when it is asked, so wrong entries cost
time and never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_MAX_PENDING_EVENTS = 1024


_Change = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""Hashes stored, and hashes removed before."""


@dataclass(slots=True)
class _Holder:
    """What is known of one worker."""

    sequence: int = 0
    """Last event up to which nothing is missing."""
    hashes: set[bytes] = field(default_factory=set)
    pending: OrderedDict[int, _Change] = field(default_factory=OrderedDict)
    """Events seen beyond a gap, to be applied again on top of the snapshot that mends it."""
    has_gap: bool = False

    def update(self, change: _Change) -> None:
        stored, removed = change
        self.hashes.difference_update(removed)
        self.hashes.update(stored)

    def settle(self) -> None:
        """Moves on over pending events that leave no hole."""
        while self.sequence + 1 in self.pending:
            self.sequence += 1
        for number in [number for number in self.pending if number <= self.sequence]:
            del self.pending[number]
        self.has_gap = bool(self.pending)


class PrefixIndex:
    """Blocks by holder. Not thread-safe; memory is bounded by what the workers themselves hold."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}

    def apply(
        self, worker_id: str, sequence: int, stored: Iterable[bytes], removed: Iterable[bytes]
    ) -> bool:
        """Takes one event: `removed` go first, then `stored` come.

        Returns:
            True while events of this worker are missing: load a snapshot. What is known is still
            matched meanwhile. A repeated or old event changes nothing.
        """
        holder = self._holders.setdefault(worker_id, _Holder())
        if sequence <= holder.sequence or sequence in holder.pending:
            return holder.has_gap
        change = tuple(stored), tuple(removed)
        holder.update(change)
        if sequence == holder.sequence + 1 and not holder.has_gap:
            holder.sequence = sequence
            return False
        holder.has_gap = True
        holder.pending[sequence] = change
        if len(holder.pending) > _MAX_PENDING_EVENTS:
            holder.pending.popitem(last=False)
        return True

    def load_snapshot(self, worker_id: str, sequence: int, hashes: Iterable[bytes]) -> bool:
        """Replaces what is known of a worker by its state right after event `sequence`.

        Events that came in meanwhile are applied on top. A snapshot older than what is known
        without a gap changes nothing.

        Returns:
            True if events are still missing: load another one.
        """
        holder = self._holders.setdefault(worker_id, _Holder())
        if sequence < holder.sequence or (sequence == holder.sequence > 0 and not holder.has_gap):
            return holder.has_gap
        holder.sequence = sequence
        holder.hashes = set(hashes)
        for number in sorted(holder.pending):
            if number > sequence:
                holder.update(holder.pending[number])
        holder.settle()
        return holder.has_gap

    def drop_worker(self, worker_id: str) -> int:
        """Forgets a worker; returns how many of its blocks were known."""
        holder = self._holders.pop(worker_id, None)
        return len(holder.hashes) if holder else 0

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` per worker; workers without the first block are left out."""
        leading = {
            worker_id: _leading(holder.hashes, hashes)
            for worker_id, holder in self._holders.items()
        }
        return {worker_id: num_blocks for worker_id, num_blocks in leading.items() if num_blocks}

    def num_blocks(self, worker_id: str) -> int:
        """Blocks known of a worker, 0 if it is not known."""
        holder = self._holders.get(worker_id)
        return len(holder.hashes) if holder else 0

    def has_gap(self, worker_id: str) -> bool:
        """True while events of the worker are missing."""
        holder = self._holders.get(worker_id)
        return holder is not None and holder.has_gap

    @property
    def worker_ids(self) -> frozenset[str]:
        """Workers known."""
        return frozenset(self._holders)


def _leading(held: set[bytes], hashes: Sequence[bytes]) -> int:
    for index, block_hash in enumerate(hashes):
        if block_hash not in held:
            return index
    return len(hashes)
