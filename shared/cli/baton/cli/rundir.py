"""The run directory: what a local system leaves on disk for the other commands to find.

$BATON_HOME/lock          held (flock) by the supervisor for as long as it lives
$BATON_HOME/system.json   processes, addresses and progress; replaced at every change
$BATON_HOME/logs/         one file per process; those of the run before in logs/previous/
$BATON_HOME/traces/       spans as JSON lines
$BATON_HOME/ready/        one file per process that is ready
$BATON_HOME/nats/         the bus's store
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from baton.cli.user_errors import UserError

STATE_VERSION = 1
RUN_ID_VARIABLE = "BATON_RUN_ID"


class NotARunDirectory(UserError):
    """A directory that a run would spoil."""


class AlreadyRunning(UserError):
    """Another supervisor holds the run directory."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"Baton already runs here (run directory {path}): see it with `baton status`, stop it"
            " with `baton down`, or set BATON_HOME to start another one"
        )


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process as the supervisor sees it."""

    name: str
    """Unique in the system, such as "decode-1"."""
    role: str
    pid: int = 0
    phase: str = "waiting"
    """waiting, starting, ready, restarting, failed or stopped."""
    fraction: float = 0.0
    """Of the loading done, 0 to 1."""
    text: str = ""
    """What it is doing now."""
    address: str = ""
    """gRPC (the bus: NATS), host:port."""
    metrics_address: str = ""
    http_address: str = ""
    cores: tuple[int, ...] = ()
    """Empty: not pinned."""
    num_restarts: int = 0
    log: str = ""
    """Path of its log file."""


@dataclass(frozen=True, slots=True)
class SystemState:
    """A local system."""

    run_id: str
    """Every process of the system has it in its environment."""
    supervisor_pid: int
    phase: str = "starting"
    """starting, ready, stopping, stopped or failed."""
    model: str = ""
    """Path of the model."""
    nats_url: str = ""
    error: str = ""
    """Why it failed, with the last lines of a log."""
    processes: tuple[ProcessState, ...] = ()

    def process(self, role: str) -> ProcessState | None:
        """The first process of a role."""
        return next((process for process in self.processes if process.role == role), None)


class RunDirectory:
    """The run directory's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.traces = path / "traces"
        self.ready = path / "ready"
        self.nats_store = path / "nats"
        self.state_file = path / "system.json"
        self._lock_file = path / "lock"

    def claim(self) -> None:
        """Makes the directory, and the lock file that marks it as a run directory.

        Raises:
            NotARunDirectory: it holds files that are not a run's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        is_marked = self._lock_file.is_file() and self._lock_file.stat().st_size == 0
        if not is_marked and any(self.path.iterdir()):
            raise NotARunDirectory(
                f"{self.path} holds other files: set BATON_HOME to a directory that is empty or new"
            )
        self._lock_file.touch()

    def prepare(self) -> None:
        """Makes the directories, empty of an earlier run; its logs are kept once.

        Raises:
            NotARunDirectory: it holds files that are not a run's.
        """
        self.claim()
        previous = self.logs / "previous"
        for directory in (self.ready, self.traces, previous):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        for log in self.logs.glob("*.log"):
            log.rename(previous / log.name)
        self.nats_store.mkdir(exist_ok=True)

    def save(self, state: SystemState) -> None:
        """Replaces the state at once: a reader sees the old or the new one, never half of one."""
        temporary = self.state_file.with_suffix(".tmp")
        document = {"version": STATE_VERSION, **asdict(state)}
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        temporary.replace(self.state_file)

    def load(self) -> SystemState | None:
        """The state last saved; None when there is none that can be read."""
        try:
            document = json.loads(self.state_file.read_text(encoding="utf-8"))
            return _state_from(document)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def running(self) -> SystemState | None:
        """The state of the system that runs now; None when no supervisor lives."""
        return self.load() if self.is_locked() else None

    def forget(self) -> None:
        """Removes the state of a system that has ended."""
        self.state_file.unlink(missing_ok=True)

    def is_locked(self) -> bool:
        """True while a supervisor lives; unlike a pid, a lock ends with its holder."""
        try:
            with self._lock_file.open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run directory.

        Raises:
            AlreadyRunning: another supervisor holds it.
            NotARunDirectory: it holds files that are not a run's.
        """
        self.claim()
        with self._lock_file.open("a") as handle:
            if not _try_lock(handle):
                raise AlreadyRunning(self.path)
            yield


def run_directory() -> RunDirectory:
    """The run directory of this user: $BATON_HOME, or one under the user's state directory."""
    home = os.environ.get("BATON_HOME")
    if home:
        return RunDirectory(Path(home).expanduser().absolute())
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return RunDirectory(Path(base) / "baton")


def _try_lock(handle: TextIO) -> bool:
    """Tries for a moment: a command that asks `is_locked` holds the lock for microseconds."""
    for _ in range(10):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def _state_from(document: dict[str, Any]) -> SystemState:
    if not isinstance(document, dict) or document.pop("version") != STATE_VERSION:
        raise ValueError("written by another version")
    processes = document.pop("processes")
    return SystemState(
        **document,
        processes=tuple(
            ProcessState(**{**process, "cores": tuple(process["cores"])}) for process in processes
        ),
    )
