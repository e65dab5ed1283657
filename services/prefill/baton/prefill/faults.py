"""Faults that a push makes on purpose, so that tests can show what the other side does about them.

Off unless the `fault` setting names some; the service warns in its log when it does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in a push. Chunks are counted from 0."""

    corrupt_chunk: int | None = None
    """Flip a bit of this chunk, after its checksum was taken."""
    drop_chunk: int | None = None
    """Leave this chunk out."""
    stall_after_chunk: int | None = None
    """Send nothing more after this chunk, and keep the stream open."""
    drop_manifest: bool = False
    """End the stream without a manifest."""
    wrong_epoch: bool = False
    """Send chunks with an epoch that is not current."""
    times: int | None = None
    """Pushes that go wrong, the first ones of the process; None means all."""


NO_FAULTS = Faults()


def parse_faults(text: str) -> Faults:
    """Faults of "corrupt_chunk=1,times=1".

    Raises:
        ValueError: a name is not known, or a number is missing or negative.
    """
    flags = {item.name for item in fields(Faults) if isinstance(item.default, bool)}
    numbers = {item.name for item in fields(Faults)} - flags
    given: dict[str, int | bool] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name in flags and not value:
            given[name] = True
        elif name in numbers and value.isascii() and value.isdigit():
            given[name] = int(value)
        else:
            names = ", ".join([*sorted(f"{name}=N" for name in numbers), *sorted(flags)])
            raise ValueError(f"must be made of {names}, got {part!r}")
    return Faults(**given)  # type: ignore[arg-type]


class FaultPlan:
    """Hands out each push's faults."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._num_left = faults.times

    @property
    def is_on(self) -> bool:
        """True when any push will go wrong."""
        return self._faults != NO_FAULTS

    def next(self) -> Faults:
        """Faults of the next push."""
        if self._num_left is None:
            return self._faults
        if self._num_left <= 0:
            return NO_FAULTS
        self._num_left -= 1
        return self._faults
