"""Starts a system's processes, keeps them running, and ends them in order.

One thread, no event loop: it polls. Other commands read the state file; a listener gets the same
state for a live table.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from baton.cli.plan import NATS_ROLE, STOP_ORDER, SystemPlan
from baton.cli.rundir import RunDirectory, SystemState
from baton.cli.supervised_process import SupervisedProcess, tail
from baton.cli.user_errors import UserError
from baton.core.roles import Role

_POLL_STARTING_S = 0.05
_POLL_RUNNING_S = 0.2
_JOIN_TIMEOUT_S = 15.0
_KILL_AFTER_S = 5.0
"""Beyond the drain grace."""

Listener = Callable[[SystemState], None]


class StartFailed(UserError):
    """A process did not start; the message holds the last lines of its log."""


class StopRequested(Exception):
    """The start was interrupted."""


@dataclass(slots=True)
class StopSignal:
    """Set by signal handlers; a second request stops waiting for running work."""

    event: Event
    num_requests: int = 0

    def request(self) -> None:
        """Asks the supervisor to stop."""
        self.num_requests += 1
        self.event.set()

    @property
    def is_urgent(self) -> bool:
        """True when it was asked for twice."""
        return self.num_requests > 1


class Supervisor:
    """The processes of one system. For the main thread, under the run directory's lock."""

    def __init__(
        self,
        plan: SystemPlan,
        run: RunDirectory,
        stop: StopSignal,
        *,
        listener: Listener,
        has_joined: Callable[[str, SystemPlan], bool],
    ) -> None:
        self._plan = plan
        self._run = run
        self._stop = stop
        self._listener = listener
        self._has_joined = has_joined
        self._processes = [SupervisedProcess(spec, run) for spec in plan.processes]
        self.state = SystemState(
            run_id=plan.run_id,
            supervisor_pid=os.getpid(),
            model=plan.options.model_path,
            nats_url=plan.nats_url,
        )
        self._publish(force=True)

    def start(self) -> None:
        """Starts everything and returns when all is ready and has found each other.

        Raises:
            StartFailed: a process ended or did not get ready in time. Call `stop`.
            StopRequested: a stop was asked for meanwhile. Call `stop`.
        """
        deadline_s = time.monotonic() + self._plan.options.start_timeout_s
        for is_bus in (True, False):
            group = [p for p in self._processes if (p.spec.role == NATS_ROLE) is is_bus]
            for process in group:
                process.start()
            self._await_ready(group, deadline_s)
        self._await_joined()
        self._set_phase("ready")

    def watch(self) -> None:
        """Keeps the processes running until a stop is asked for."""
        while not self._stop.event.wait(_POLL_RUNNING_S):
            for process in self._processes:
                process.refresh()
                if self._plan.options.can_restart:
                    process.restart_if_failed()
            self._publish()

    def stop(self) -> bool:
        """Ends everything, callers before what they call; False if something would not end."""
        self._set_phase("stopping")
        for roles in STOP_ORDER:
            group = [process for process in self._processes if process.spec.role in roles]
            self._stop_group(group)
        has_ended = all(process.has_ended() for process in self._processes)
        self._set_phase("stopped" if has_ended else "failed")
        return has_ended

    def fail(self, error: str) -> None:
        """Records in the state why the system did not start."""
        self.state = replace(self.state, phase="failed", error=error)
        self._publish(force=True)

    def _await_ready(self, group: list[SupervisedProcess], deadline_s: float) -> None:
        while True:
            for process in self._processes:
                process.refresh()
            self._publish()
            for process in self._processes:
                if process.state.phase == "failed":
                    raise StartFailed(_failure(process, process.state.text))
            waiting = [process for process in group if process.state.phase != "ready"]
            if not waiting:
                return
            if time.monotonic() >= deadline_s:
                limit_s = self._plan.options.start_timeout_s
                raise StartFailed(_failure(waiting[0], f"not ready within {limit_s:g} s"))
            if self._stop.event.wait(_POLL_STARTING_S):
                raise StopRequested

    def _await_joined(self) -> None:
        """Waits until the scheduler sees every worker, so that the first request finds them."""
        scheduler = self._plan.of_role(Role.SCHEDULER)[0]
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        while not self._has_joined(scheduler.address, self._plan):
            if time.monotonic() >= deadline_s:
                raise StartFailed(
                    f"the scheduler did not find every worker within {_JOIN_TIMEOUT_S:g} s; see"
                    f" {self._run.logs / 'scheduler.log'}"
                )
            if self._stop.event.wait(_POLL_STARTING_S):
                raise StopRequested

    def _stop_group(self, group: list[SupervisedProcess]) -> None:
        for process in group:
            process.terminate()
        grace_s = self._plan.options.drain_grace_s + _KILL_AFTER_S
        self._await_end(group, grace_s, can_hurry=True)
        for process in group:
            process.kill()
        if self._await_end(group, _KILL_AFTER_S):
            for process in group:
                process.mark_stopped()
            self._publish()

    def _await_end(
        self, group: list[SupervisedProcess], timeout_s: float, *, can_hurry: bool = False
    ) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not all(process.has_ended() for process in group):
            if time.monotonic() >= deadline_s or (can_hurry and self._stop.is_urgent):
                return False
            time.sleep(_POLL_STARTING_S / 2)
        return True

    def _set_phase(self, phase: str) -> None:
        self.state = replace(self.state, phase=phase)
        self._publish(force=True)

    def _publish(self, *, force: bool = False) -> None:
        processes = tuple(process.state for process in self._processes)
        if not force and processes == self.state.processes:
            return
        self.state = replace(self.state, processes=processes)
        try:
            self._run.save(self.state)
        except OSError as error:
            # A full disk must not take a running system down, nor leave processes behind.
            sys.stderr.write(f"cannot write {self._run.state_file}: {error.strerror}\n")
        self._listener(self.state)


def _failure(process: SupervisedProcess, what: str) -> str:
    log = process.state.log
    lines = tail(Path(log))
    shown = f"; the last lines of {log}:\n{lines}" if lines else f"; see {log}"
    return f"{process.spec.name} {what}{shown}"
