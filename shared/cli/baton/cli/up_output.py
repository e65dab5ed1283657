"""What `baton up` prints: progress, next steps, and the system as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cli.models import is_demo
from baton.cli.rundir import ProcessState, SystemState
from baton.core.roles import Role

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
        """Leaves the last state there; what is printed next begins on a new line."""
        is_last = self.is_started
        super().stop()
        if is_last and self.renderable and not self.console.is_terminal:
            self.console.line()


def print_ready(console: Console, state: SystemState, *, detached: bool, as_json: bool) -> None:
    """Says that a system is up: as JSON on standard output, or as what to do next."""
    if as_json:
        sys.stdout.write(json.dumps(_to_document(state)) + "\n")
        sys.stdout.flush()
        return
    scheduler, gateway = state.process(Role.SCHEDULER), state.process(Role.GATEWAY)
    console.print("\n[bold green]Baton is up.[/]")
    if scheduler:
        console.print(f"  gRPC  {scheduler.address}", highlight=False)
    if gateway:
        http = f"http://{gateway.http_address}"
        console.print(f"  HTTP  {http}/v1  (OpenAI-compatible)", highlight=False)
        console.print(f"  page  {http}/console", highlight=False)
    console.print("\nNext:", style="dim")
    prompt = "def main():" if is_demo(state.model) else "Once upon a time"
    for command, purpose in (
        (f'baton generate "{prompt}"', "stream a completion"),
        ("baton trace", "see where its time went"),
        ("baton status", "see the workers and their KV blocks"),
        ("baton down" if detached else "Ctrl-C", "stop everything"),
    ):
        console.print(f"  {command:<34} [dim]{purpose}[/]", highlight=False)


def _progress_table(state: SystemState) -> Table:
    """One line per process: what it is doing now."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=12)
    table.add_column(min_width=10)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for process in state.processes:
        phase = Text(process.phase, style=_STYLES.get(process.phase, ""))
        table.add_row(process.name, phase, _activity(process))
    return table


def _activity(process: ProcessState) -> Text:
    if process.phase == "ready":
        pinned = f"  cores {','.join(map(str, process.cores))}" if process.cores else ""
        return Text(f"{process.http_address or process.address}{pinned}", style="dim")
    if process.phase == "starting" and process.fraction > 0:
        filled = round(process.fraction * _BAR_CELLS)
        bar = "━" * filled + "─" * (_BAR_CELLS - filled)
        return Text(f"{bar} {process.fraction:4.0%} {process.text}")
    return Text(process.text)


def _to_document(state: SystemState) -> dict[str, Any]:
    scheduler, gateway = state.process(Role.SCHEDULER), state.process(Role.GATEWAY)
    http = f"http://{gateway.http_address}" if gateway else None
    shown = ("name", "role", "pid", "address", "metrics_address", "log")
    return {
        "scheduler": scheduler.address if scheduler else None,
        "http": http and f"{http}/v1",
        "console": http and f"{http}/console",
        "processes": [
            {name: getattr(process, name) for name in shown} for process in state.processes
        ],
    }
