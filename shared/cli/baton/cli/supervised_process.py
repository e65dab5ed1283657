"""One supervised process: start, progress from its log, readiness, end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.cli import child
from baton.cli.plan import NATS_ROLE, ProcessSpec
from baton.cli.ports import is_listening
from baton.cli.rundir import ProcessState, RunDirectory

_TAIL_LINES = 15
_READ_BYTES = 1 << 16
_MAX_LINE_CHARS = 300
_BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_HEALTHY_AFTER_S = 30.0
"""A process that ran this long starts its backoff anew."""


class LogFollower:
    """Reads what a growing log says about loading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def progress(self) -> tuple[float, str] | None:
        """Fraction and text of the last "loading" event since the last call."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._offset)
                data = log.read(_READ_BYTES)
        except FileNotFoundError:
            return None
        self._offset += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_READ_BYTES:]
        events = [event for line in lines if (event := _loading_event(line))]
        return events[-1] if events else None


class SupervisedProcess:
    """A process with its state.

    For the main thread only: on Linux a child dies with the thread that started it.
    """

    def __init__(self, spec: ProcessSpec, run: RunDirectory) -> None:
        self.spec = spec
        self._log = run.logs / f"{spec.name}.log"
        self._ready_file = run.ready / f"{spec.name}.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._follower = LogFollower(self._log)
        self._started_at_s = 0.0
        self._restart_at_s = 0.0
        self._num_failures = 0
        self.state = ProcessState(
            name=spec.name,
            role=spec.role,
            address=spec.address,
            metrics_address=spec.metrics_address,
            http_address=spec.http_address,
            cores=spec.cores,
            log=str(self._log),
        )

    def start(self) -> None:
        """Starts it in a new session, so that the terminal's Ctrl-C does not reach it."""
        self._ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-I", "-S", str(Path(child.__file__)), str(os.getpid())]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self.spec.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.environment},
                start_new_session=True,
            )
        self._started_at_s = time.monotonic()
        self.state = replace(
            self.state, pid=self._process.pid, phase="starting", fraction=0.0, text="starting"
        )

    def refresh(self) -> None:
        """Looks at exit, ready file and log, and brings `state` up to date."""
        if self._process is None or self.state.phase not in {"starting", "ready"}:
            return
        exit_code = self._process.poll()
        if exit_code is not None:
            self.state = replace(self.state, phase="failed", text=describe_exit(exit_code))
        elif self.state.phase == "starting":
            self._refresh_start()

    def restart_if_failed(self) -> None:
        """Starts it again after a failure, when its backoff has passed."""
        now = time.monotonic()
        if self.state.phase == "restarting" and now >= self._restart_at_s:
            self.start()
        elif self.state.phase == "failed":
            if now - self._started_at_s > _HEALTHY_AFTER_S:
                self._num_failures = 0
            delay_s = _BACKOFF_S[min(self._num_failures, len(_BACKOFF_S) - 1)]
            self._num_failures += 1
            self._restart_at_s = now + delay_s
            self.state = replace(
                self.state,
                phase="restarting",
                text=f"{self.state.text}; starts again in {delay_s:g} s",
                num_restarts=self.state.num_restarts + 1,
            )

    def terminate(self) -> None:
        """Asks it to end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends it, and whatever it started."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """True when it does not run."""
        return self._process is None or self._process.poll() is not None

    def mark_stopped(self) -> None:
        """Records an end that was asked for."""
        self.state = replace(self.state, phase="stopped", text="", pid=0)

    def _refresh_start(self) -> None:
        ready: dict[str, Any] | None = None
        if self.spec.role == NATS_ROLE and is_listening(self.spec.address):
            ready = {}
        elif self._ready_file.exists():
            ready = _json_object(self._ready_file.read_bytes())
        if ready is not None:
            self.state = replace(
                self.state,
                phase="ready",
                fraction=1.0,
                text="",
                address=str(ready.get("address", self.state.address)),
                metrics_address=str(ready.get("metrics_address", self.state.metrics_address)),
            )
        elif progress := self._follower.progress():
            self.state = replace(self.state, fraction=progress[0], text=progress[1])


def tail(path: Path) -> str:
    """The last lines of a log, JSON lines made readable."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _READ_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(_readable(line) for line in lines[-_TAIL_LINES:])


def describe_exit(exit_code: int) -> str:
    """Words for a `Popen.returncode`."""
    if exit_code >= 0:
        return f"exited with status {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def _loading_event(line: bytes) -> tuple[float, str] | None:
    event = _json_object(line)
    if event is None or event.get("event") != "loading":
        return None
    fraction = event.get("fraction", 0.0)
    if not isinstance(fraction, int | float):
        return None
    return min(1.0, max(0.0, fraction)), str(event.get("text", "loading"))


def _json_object(data: bytes | str) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _readable(line: str) -> str:
    event = _json_object(line)
    if event is None:
        return line[:_MAX_LINE_CHARS]
    level = str(event.pop("level", "info")).lower()
    text = str(event.pop("event", event.pop("message", "")))
    for noise in ("ts", "time", "timestamp", "role", "worker_id", "logger", "trace_id", "span_id"):
        event.pop(noise, None)
    fields = " ".join(f"{name}={value}" for name, value in event.items())
    line = f"{level}: {text} {fields}"
    return line if "\n" in fields else line[:_MAX_LINE_CHARS]
