"""A system's state as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cli.rundir import ProcessState, SystemState

_REFRESH_PER_S = 8
_BAR_CELLS = 20
_STYLES = {
    "waiting": "dim",
    "starting": "yellow",
    "ready": "green",
    "restarting": "yellow",
    "failed": "bold red",
    "stopped": "dim",
}


class ProgressDisplay(Live):
    """A start's progress: a table that changes on a terminal, and only its end elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, refresh_per_second=_REFRESH_PER_S)

    def show(self, state: SystemState) -> None:
        """Shows a state, until the display is stopped."""
        if self.is_started:
            self.update(_progress_table(state))

    def stop(self) -> None:
        """Leaves the last state there; what is printed next begins on a line of its own."""
        is_last = self.is_started
        super().stop()
        if is_last and self.renderable and not self.console.is_terminal:
            self.console.line()


def _progress_table(state: SystemState) -> RenderableType:
    """One line per process: what it is doing now."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=12)
    table.add_column(min_width=10)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for process in state.processes:
        phase = Text(process.phase, style=_STYLES.get(process.phase, ""))
        table.add_row(process.name, phase, _activity(process))
    return Group(table)


def _activity(process: ProcessState) -> Text:
    if process.phase == "ready":
        pinned = f"  cores {','.join(map(str, process.cores))}" if process.cores else ""
        return Text(f"{process.http_address or process.address}{pinned}", style="dim")
    if process.phase == "starting" and process.fraction > 0:
        filled = round(process.fraction * _BAR_CELLS)
        bar = "━" * filled + "─" * (_BAR_CELLS - filled)
        return Text(f"{bar} {process.fraction:4.0%} {process.text}")
    return Text(process.text)


def print_next_steps(console: Console, state: SystemState, *, detached: bool) -> None:
    """Where things are, and what to type next."""
    scheduler = state.process("scheduler")
    gateway = state.process("gateway")
    console.print("\n[bold green]Baton is up.[/]")
    if scheduler:
        console.print(f"  gRPC  {scheduler.address}", highlight=False)
    if gateway:
        console.print(
            f"  HTTP  http://{gateway.http_address}/v1  (OpenAI-compatible)", highlight=False
        )
        console.print(f"  page  http://{gateway.http_address}/console", highlight=False)
    console.print("\nNext:", style="dim")
    for command, purpose in (
        ('baton generate "def main():"', "stream a completion"),
        ("baton trace", "see where its time went"),
        ("baton status", "see the workers and their KV blocks"),
        ("baton down" if detached else "Ctrl-C", "stop everything"),
    ):
        console.print(f"  {command:<30} [dim]{purpose}[/]", highlight=False)


def system_document(state: SystemState) -> dict[str, Any]:
    """A system that is up, as `baton up --json` prints it."""
    gateway, scheduler = state.process("gateway"), state.process("scheduler")
    http = f"http://{gateway.http_address}" if gateway else None
    return {
        "scheduler": scheduler.address if scheduler else None,
        "http": http and f"{http}/v1",
        "console": http and f"{http}/console",
        "processes": [
            {
                "name": process.name,
                "role": process.role,
                "pid": process.pid,
                "address": process.address,
                "metrics_address": process.metrics_address,
                "log": process.log,
            }
            for process in state.processes
        ],
    }
