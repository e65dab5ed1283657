"""Copies of prompts' KV that are kept after their hand-off, each under a lease."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hold:
    """One kept copy."""

    seq_id: str
    request_id: str
    attempt: int
    lease_ends_at_s: float


class Holds:
    """All kept copies of a worker. The caller lets go of the blocks of what is taken out here."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._by_seq_id: dict[str, Hold] = {}

    def __len__(self) -> int:
        return len(self._by_seq_id)

    def add(self, seq_id: str, request_id: str, attempt: int, now: float) -> None:
        """Keeps a copy from now on."""
        self._by_seq_id[seq_id] = Hold(seq_id, request_id, attempt, now + self._lease_s)

    def take(self, request_id: str, attempt: int = 0) -> list[Hold]:
        """Takes out the copies of a request: of one attempt, or of all if it is 0."""
        return self._take([
            hold
            for hold in self._by_seq_id.values()
            if hold.request_id == request_id and attempt in {0, hold.attempt}
        ])

    def take_expired(self, now: float) -> list[Hold]:
        """Takes out the copies whose lease has ended."""
        return self._take([
            hold for hold in self._by_seq_id.values() if hold.lease_ends_at_s <= now
        ])

    def take_oldest(self) -> list[Hold]:
        """Takes out the copy that has been kept longest, if there is one."""
        return self._take(list(self._by_seq_id.values())[:1])

    def take_all(self) -> list[Hold]:
        """Takes out every copy."""
        return self._take(list(self._by_seq_id.values()))

    def _take(self, holds: list[Hold]) -> list[Hold]:
        for hold in holds:
            del self._by_seq_id[hold.seq_id]
        return holds
