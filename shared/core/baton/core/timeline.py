"""What a stage consisted of, part by part, in a bounded number of slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MAX_SLICES = 64
"""Of one stage. As many as a screen can show."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of a stage, or some neighbouring ones together. Mirrors baton.v1.StageSlice."""

    start_s: float
    end_s: float
    num_parts: int = 1
    num_tokens: int = 0
    num_bytes: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def joined(self, other: Slice) -> Slice:
        """This one and a later one as one."""
        return Slice(
            start_s=min(self.start_s, other.start_s),
            end_s=max(self.end_s, other.end_s),
            num_parts=self.num_parts + other.num_parts,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
            draft_tokens=self.draft_tokens + other.draft_tokens,
            accepted_tokens=self.accepted_tokens + other.accepted_tokens,
        )

    def shifted(self, by_s: float) -> Slice:
        """The same at another origin of time."""
        return replace(self, start_s=self.start_s + by_s, end_s=self.end_s + by_s)


@dataclass(frozen=True, slots=True)
class Track:
    """The parts of one stage on one worker."""

    name: str
    """`prefill_chunk`, `kv_chunk` or `decode_step`."""
    worker_id: str
    slices: tuple[Slice, ...]
    """Relative to the request's arrival."""


class Slices:
    """A stage's slices by time. When they are too many, neighbours are joined.

    Every slice but the last one then has the same number of parts, a power of two, so that all of
    the stage is seen equally finely, and sums over the slices stay what they were.
    """

    def __init__(self, limit: int = MAX_SLICES) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be even and at least 2, got {limit}")
        self._limit = limit
        self._slices: list[Slice] = []
        self._stride = 1

    def __iter__(self) -> Iterator[Slice]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def add(self, part: Slice) -> None:
        """Adds the next part."""
        if self._slices and self._slices[-1].num_parts < self._stride:
            self._slices[-1] = self._slices[-1].joined(part)
            return
        if len(self._slices) == self._limit:
            pairs = zip(self._slices[::2], self._slices[1::2], strict=True)
            self._slices = [first.joined(second) for first, second in pairs]
            self._stride *= 2
        self._slices.append(part)
