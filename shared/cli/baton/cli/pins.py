"""`baton cache`: prefixes that the cache keeps from eviction."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from baton.client import PinnedPrefix

_MIB = 1 << 20


def print_pins(console: Console, pins: Sequence[PinnedPrefix]) -> None:
    """Prints the pins as a table."""
    if not pins:
        console.print("nothing is pinned")
        return
    numbers = [Column(name, justify="right") for name in ("blocks stored", "of", "MiB", "ends in")]
    table = Table("pin", "label", *numbers, box=None, header_style="bold", pad_edge=False)
    for pin in pins:
        table.add_row(
            pin.pin_id,
            Text(pin.label),
            str(pin.num_stored_blocks),
            str(pin.num_blocks),
            f"{pin.num_bytes / _MIB:.1f}",
            f"{pin.remaining_s / 3600:.1f} h",
        )
    console.print(table)
