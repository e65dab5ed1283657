"""Faults made on purpose, so that tests can show what the other side does about them.

Off unless the `fault` setting names some; the service warns in its log when it does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

_SECONDS = re.compile(r"\d{1,4}(\.\d{1,6})?")


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with a prompt. Chunks are counted from 0."""

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
    delay_start_s: float = 0.0
    """Wait before the prompt is queued."""
    delay_chunk_s: float = 0.0
    """Notice so late that blocks were computed."""
    times: int | None = None
    """Prompts that go wrong, the first ones of the process; None means all."""


NO_FAULTS = Faults()


def parse_faults(text: str) -> Faults:
    """Faults of "corrupt_chunk=1,times=1".

    Raises:
        ValueError: a name is not known, or a number is missing or negative.
    """
    flags = {item.name for item in fields(Faults) if isinstance(item.default, bool)}
    delays = {item.name for item in fields(Faults) if isinstance(item.default, float)}
    numbers = {item.name for item in fields(Faults)} - flags - delays
    given: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name in flags and not value:
            given[name] = True
        elif name in numbers and value.isascii() and value.isdigit():
            given[name] = int(value)
        elif name in delays and _SECONDS.fullmatch(value):
            given[name] = float(value)
        else:
            names = ", ".join([
                *sorted(f"{name}=N" for name in numbers),
                *sorted(f"{name}=S" for name in delays),
                *sorted(flags),
            ])
            raise ValueError(f"must be made of {names}, got {part!r}")
    return Faults(**given)  # type: ignore[arg-type]


class FaultPlan:
    """Hands out each prompt's faults."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._num_left = faults.times

    @property
    def is_on(self) -> bool:
        """True when any prompt will go wrong."""
        return self._faults != NO_FAULTS

    def next(self) -> Faults:
        """Faults of the next prompt."""
        if self._num_left is None:
            return self._faults
        if self._num_left <= 0:
            return NO_FAULTS
        self._num_left -= 1
        return self._faults
