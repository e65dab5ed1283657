"""Who may write KV into a decode worker, and until when: reservations, epochs, leases, attempts.

Nothing here owns a block: the worker releases what this module says has ended. Not thread-safe:
a table belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from baton.core.errors import Internal, RequestNotFound, StaleEpoch


class ReservationState(Enum):
    """Where a reservation stands on the decode worker."""

    RESERVED = "reserved"
    """Blocks are set aside; nothing is written."""
    FILLING = "filling"
    """A push is open."""
    COMMITTED = "committed"
    """The push's manifest was verified."""
    RUNNING = "running"
    """A caller reads its tokens: the call, not the lease, keeps it alive."""
    RELEASED = "released"
    """Fenced: no write is accepted any more."""


_S = ReservationState
TRANSITIONS: frozenset[tuple[ReservationState, ReservationState]] = frozenset({
    (_S.RESERVED, _S.FILLING),
    (_S.RESERVED, _S.RUNNING),  # local prefill
    (_S.FILLING, _S.COMMITTED),
    (_S.COMMITTED, _S.RUNNING),
    *((state, _S.RELEASED) for state in _S if state is not _S.RELEASED),
})


@dataclass(slots=True)
class Reservation:
    """Room for one attempt of a request, under a lease."""

    reservation_id: str
    request_id: str
    attempt: int
    epoch: int
    lease_ends_at_s: float
    state: ReservationState = ReservationState.RESERVED
    is_attached: bool = False
    """A Decode call waits for it or reads from it, so the lease rests."""

    @property
    def seq_id(self) -> str:
        """The engine's name for it."""
        return f"{self.request_id}/{self.attempt}"

    def transition(self, to: ReservationState) -> None:
        """Changes the state.

        Raises:
            StaleEpoch: it has been released.
            Internal: the transition is not a legal one.
        """
        if self.state is ReservationState.RELEASED:
            raise StaleEpoch(f"reservation {self.reservation_id} has been released")
        if (self.state, to) not in TRANSITIONS:
            raise Internal(f"reservation cannot go from {self.state.value} to {to.value}")
        self.state = to


@dataclass(slots=True)
class ReservationTable:
    """All live reservations of a decode worker."""

    lease_s: float
    _by_id: dict[str, Reservation] = field(default_factory=dict)
    _epoch: int = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def older(self, request_id: str, attempt: int) -> list[Reservation]:
        """Reservations that this attempt replaces: the caller releases them, then opens its own.

        Raises:
            StaleEpoch: this attempt or a later one is here already.
        """
        found = self.of_request(request_id)
        for reservation in found:
            if reservation.attempt >= attempt:
                raise StaleEpoch(
                    f"attempt {attempt} of request {request_id} comes too late: "
                    f"attempt {reservation.attempt} is here"
                )
        return found

    def open(self, reservation_id: str, request_id: str, attempt: int, now: float) -> Reservation:
        """Adds a reservation with a new epoch."""
        self._epoch += 1
        reservation = Reservation(
            reservation_id, request_id, attempt, self._epoch, now + self.lease_s
        )
        self._by_id[reservation_id] = reservation
        return reservation

    def find(self, reservation_id: str, epoch: int) -> Reservation:
        """The live reservation of that id and epoch.

        Raises:
            RequestNotFound: there is none with that id.
            StaleEpoch: it has another epoch.
        """
        reservation = self._by_id.get(reservation_id)
        if reservation is None:
            raise RequestNotFound(
                f"reservation {reservation_id} is not known: it was released, or its lease ended"
            )
        if reservation.epoch != epoch:
            raise StaleEpoch(
                f"reservation {reservation_id} has epoch {reservation.epoch}, not {epoch}"
            )
        return reservation

    def get(self, reservation_id: str) -> Reservation | None:
        """The live reservation of that id, of any epoch."""
        return self._by_id.get(reservation_id)

    def of_request(self, request_id: str) -> list[Reservation]:
        """Live reservations of a request."""
        return [item for item in self._by_id.values() if item.request_id == request_id]

    def touch(self, reservation: Reservation, now: float) -> None:
        """Renews a lease because something moved."""
        reservation.lease_ends_at_s = now + self.lease_s

    def renew(self, reservation_ids: Iterable[str], now: float) -> list[str]:
        """Renews leases; returns the ids that are not known."""
        unknown = []
        for reservation_id in reservation_ids:
            reservation = self._by_id.get(reservation_id)
            if reservation is None:
                unknown.append(reservation_id)
            else:
                self.touch(reservation, now)
        return unknown

    def expired(self, now: float) -> list[Reservation]:
        """Reservations whose lease has ended: the caller releases them."""
        return [
            item
            for item in self._by_id.values()
            if not item.is_attached and item.lease_ends_at_s <= now
        ]

    def release(self, reservation: Reservation) -> bool:
        """Fences a reservation and forgets it; False when that was done before."""
        if reservation.state is ReservationState.RELEASED:
            return False
        reservation.transition(ReservationState.RELEASED)
        del self._by_id[reservation.reservation_id]
        return True
