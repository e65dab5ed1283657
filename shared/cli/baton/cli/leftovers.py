"""Finds and ends the processes of a run, even after their supervisor was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from baton.cli.rundir import RUN_ID_VARIABLE, SystemState

_PROC = Path("/proc")


def living(state: SystemState) -> list[int]:
    """Pids of the run's living processes; where there is /proc, with their children."""
    if (_PROC / "self" / "environ").exists():
        return _pids_with(f"{RUN_ID_VARIABLE}={state.run_id}".encode())
    return [process.pid for process in state.processes if process.pid and is_alive(process.pid)]


def end_all(state: SystemState, *, timeout_s: float = 5.0) -> list[int]:
    """Kills what is left of a run; returns the pids that could not be ended."""
    ends_at = time.monotonic() + timeout_s
    while pids := living(state):
        if time.monotonic() >= ends_at:
            return pids
        send(pids, signal.SIGKILL)
        time.sleep(0.02)
    return []


def is_alive(pid: int) -> bool:
    """True while a process with this pid exists (and is not a zombie, where /proc tells)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(_PROC / str(pid))


def send(pids: Iterable[int], signal_number: signal.Signals) -> None:
    """Sends a signal to those of the processes that still live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def _pids_with(entry: bytes) -> list[int]:
    found = []
    for directory in _PROC.iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:
            continue  # Ended meanwhile, or another user's.
        if entry in environment.split(b"\0"):
            found.append(int(directory.name))
    return sorted(found)


def _is_zombie(directory: Path) -> bool:
    try:
        stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
