"""`baton up` and `baton down`: a local system in the foreground or behind the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from random import SystemRandom
from secrets import token_urlsafe
from threading import Event
from types import FrameType
from typing import Any

from rich.console import Console

from baton.cli.cores import available_cores
from baton.cli.leftovers import end_all, is_alive, living, send
from baton.cli.plan import PlanError, SystemPlan, UpOptions, make_plan
from baton.cli.ports import PortChooser
from baton.cli.rundir import AlreadyRunning, RunDirectory, SystemState, run_directory
from baton.cli.supervised_process import tail
from baton.cli.supervisor import Listener, StartFailed, StopRequested, StopSignal, Supervisor
from baton.cli.up_output import ProgressDisplay, print_ready
from baton.cli.user_errors import EXIT_INTERRUPTED
from baton.client import BatonError, Client

EXIT_OK = 0
EXIT_FAILED = 1
_JOIN_CALL_TIMEOUT_S = 1.0
_POLL_S = 0.05
_STOP_TIMEOUT_S = 90.0
_KILL_TIMEOUT_S = 5.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def new_run_id() -> str:
    """Id of a run, unique on this machine."""
    return f"{SystemRandom().getrandbits(64):016x}"


@contextmanager
def local_system(
    options: UpOptions, run: RunDirectory, run_id: str, stop: StopSignal, listener: Listener
) -> Iterator[Supervisor]:
    """A system that is up; whatever happens inside, it is down afterwards.

    Raises:
        AlreadyRunning, NotARunDirectory, PlanError: nothing was started.
        StartFailed, StopRequested: it did not get up, and is down again.
    """
    with run.lock():
        if previous := run.load():
            end_all(previous)
            run.forget()  # or `down` would take the earlier supervisor's pid for this one's
        run.prepare()
        share_gateway_key()
        plan = make_plan(options, run, run_id, available_cores(), PortChooser(SystemRandom()))
        supervisor = Supervisor(plan, run, stop, listener=listener, has_joined=has_joined)
        failure = ""
        try:
            supervisor.start()
            yield supervisor
        except StartFailed as error:
            failure = str(error)
            raise
        finally:
            supervisor.stop()
            end_all(supervisor.state)
            if failure:
                supervisor.fail(failure)
            else:
                run.forget()


def share_gateway_key() -> None:
    """Where callers need keys, gives gateway, scheduler and this process one in common."""
    if os.environ.keys() & {"BATON_API_KEYS", "BATON_TENANTS_FILE"}:
        os.environ.setdefault("BATON_GATEWAY_KEY", token_urlsafe())


def has_joined(scheduler_address: str, plan: SystemPlan) -> bool:
    """True when the scheduler sees all workers of the plan."""
    options = plan.options
    try:
        with Client(scheduler_address, timeout_s=_JOIN_CALL_TIMEOUT_S) as client:
            models = client.models()
    except BatonError:
        return False
    return any(
        model.num_prefill_workers >= options.num_prefill
        and model.num_decode_workers >= options.num_decode
        for model in models
    )


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """A stop signal that Ctrl-C, SIGTERM and a closed terminal set, within the context."""
    stop = StopSignal(Event())
    with _signal_handler(lambda _number, _frame: stop.request()):
        yield stop


@contextmanager
def interruptible() -> Iterator[None]:
    """Within `stop_on_signals`: here the signals raise KeyboardInterrupt instead."""
    with _signal_handler(signal.default_int_handler):
        yield


@contextmanager
def _signal_handler(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run_foreground(options: UpOptions, console: Console, *, as_json: bool) -> int:
    """Starts a system, shows its progress, and keeps it until Ctrl-C; returns the exit status."""
    run = run_directory()
    with stop_on_signals() as stop:
        try:
            with ProgressDisplay(console) as display:
                reporter = _Reporter(console, display)
                with local_system(options, run, new_run_id(), stop, reporter) as supervisor:
                    display.stop()
                    print_ready(console, supervisor.state, detached=False, as_json=as_json)
                    reporter.says_changes = True
                    supervisor.watch()
                    console.print("\nstopping; Ctrl-C again does not wait for running requests")
                    reporter.says_changes = False
        except StopRequested:
            return _interrupted(console)
        except (StartFailed, PlanError) as error:
            return _not_started(console, str(error))
    console.print("everything has stopped")
    return EXIT_OK


def run_detached(options: UpOptions, console: Console, *, as_json: bool) -> int:
    """Starts a supervisor in a new session, and waits until its system is up."""
    run = run_directory()
    if run.is_locked():
        raise AlreadyRunning(run.path)
    run.claim()
    run_id = new_run_id()
    log = run.path / "supervisor.log"
    with (
        log.open("wb") as output,
        stop_on_signals() as stop,  # before the supervisor starts: nothing else would stop it
    ):
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "baton.cli.background", run_id, json.dumps(asdict(options))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "BATON_HOME": str(run.path)},
            start_new_session=True,
        )
        state = None
        with ProgressDisplay(console) as display:
            while state is None or state.phase != "ready":
                has_ended = supervisor.poll() is not None
                if (found := run.load()) and found.run_id == run_id:
                    state = found
                    display.show(state)
                if has_ended:
                    break
                if stop.event.wait(_POLL_S):
                    supervisor.send_signal(signal.SIGTERM)
                    stop.event.clear()
    if state is not None and state.phase == "ready":
        print_ready(console, state, detached=True, as_json=as_json)
        return EXIT_OK
    if stop.num_requests:
        return _interrupted(console)
    error = state.error if state else ""
    return _not_started(console, error or tail(log) or "the supervisor ended")


def stop_system(run: RunDirectory, console: Console) -> int:
    """Stops the running system and makes sure that nothing is left; returns the exit status."""
    was_running, state = run.is_locked(), run.load()
    if state is None:
        if was_running:
            console.print(f"a supervisor is just starting in {run.path}: try again in a moment")
            return EXIT_FAILED
        console.print("Baton is not running")
        return EXIT_OK
    if was_running:
        with console.status("stopping"):
            _end_supervisor(run, state.supervisor_pid)
    num_left = len(living(state))
    if survivors := end_all(state):
        console.print(f"[bold red]could not end[/] processes {survivors}: try `kill -9`")
        return EXIT_FAILED
    run.forget()
    if was_running:
        console.print(f"stopped {len(state.processes)} processes; nothing is left")
    elif num_left:
        console.print(f"ended {num_left} left-over processes")
    else:
        console.print("Baton is not running")
    return EXIT_OK


class _Reporter:
    """Shows states: as a live table while starting, later as a line per change."""

    def __init__(self, console: Console, display: ProgressDisplay) -> None:
        self._console = console
        self._display = display
        self._phases: dict[str, str] = {}
        self.says_changes = False

    def __call__(self, state: SystemState) -> None:
        self._display.show(state)
        for process in state.processes:
            previous = self._phases.get(process.name)
            self._phases[process.name] = process.phase
            if self.says_changes and previous not in {None, process.phase}:
                text = f"{process.name}: {process.phase} {process.text}".rstrip()
                self._console.print(text, markup=False, highlight=False)


def _interrupted(console: Console) -> int:
    console.print("\ninterrupted while starting: everything was stopped")
    return EXIT_INTERRUPTED


def _not_started(console: Console, why: str) -> int:
    console.print("\n[bold red]not started:[/]", end=" ")
    console.print(why, markup=False, highlight=False)
    return EXIT_FAILED


def _end_supervisor(run: RunDirectory, pid: int) -> None:
    for number, timeout_s in ((signal.SIGTERM, _STOP_TIMEOUT_S), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        if run.is_locked() and is_alive(pid):
            send([pid], number)
        ends_at_s = time.monotonic() + timeout_s
        while run.is_locked() and time.monotonic() < ends_at_s:
            time.sleep(_POLL_S)
