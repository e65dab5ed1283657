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
from baton.cli.process import tail
from baton.cli.progress import ProgressDisplay
from baton.cli.rundir import AlreadyRunning, RunDirectory, SystemState
from baton.cli.supervisor import Listener, StartFailed, StopRequested, StopSignal, Supervisor
from baton.client import BatonError, Client

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
_JOIN_CALL_TIMEOUT_S = 1.0
_POLL_S = 0.05
_STOP_TIMEOUT_S = 90.0
_INTERRUPTED = "\ninterrupted while starting: everything was stopped"
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
        AlreadyRunning, PlanError: nothing was started.
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

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.request()

    with _signal_handler(handle):
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


def run_foreground(
    options: UpOptions,
    run: RunDirectory,
    console: Console,
    on_ready: Callable[[SystemState], None],
) -> int:
    """Starts a system, shows its progress, and keeps it until Ctrl-C; returns the exit status."""
    with stop_on_signals() as stop:
        live = ProgressDisplay(console)
        reporter = _Reporter(console, live)
        try:
            live.start()
            with local_system(options, run, new_run_id(), stop, reporter) as supervisor:
                live.stop()
                on_ready(supervisor.state)
                reporter.say_changes = True
                supervisor.watch()
                console.print("\nstopping; once more Ctrl-C does not wait for running requests")
                reporter.say_changes = False
        except StopRequested:
            live.stop()
            console.print(_INTERRUPTED)
            return EXIT_INTERRUPTED
        except (StartFailed, PlanError) as error:
            live.stop()
            console.print(f"\n[bold red]not started:[/] {_escape(str(error))}", highlight=False)
            return EXIT_FAILED
        finally:
            live.stop()
        console.print("everything has stopped")
        return EXIT_OK


def run_detached(
    options: UpOptions,
    run: RunDirectory,
    console: Console,
    on_ready: Callable[[SystemState], None],
) -> int:
    """Starts a supervisor in a session of its own, and waits until its system is up."""
    if run.is_locked():
        raise AlreadyRunning(run.path)
    run_id = new_run_id()
    run.path.mkdir(parents=True, exist_ok=True)
    log = run.path / "supervisor.log"
    with (
        log.open("wb") as output,
        stop_on_signals() as stop,  # before it starts: nobody else would stop it
        ProgressDisplay(console) as live,
    ):
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "baton.cli.background", run_id, json.dumps(asdict(options))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "BATON_HOME": str(run.path)},
            start_new_session=True,
        )
        while True:
            exit_code = supervisor.poll()
            state = run.load()
            if state is not None and state.run_id == run_id:
                live.show(state)
                if state.phase == "ready":
                    break
            if exit_code is not None and stop.num_requests:
                live.stop()
                console.print(_INTERRUPTED)
                return EXIT_INTERRUPTED
            if exit_code is not None:
                error = state.error if state and state.run_id == run_id else ""
                live.stop()
                text = error or tail(log) or "the supervisor ended"
                console.print(f"\n[bold red]not started:[/] {_escape(text)}", highlight=False)
                return EXIT_FAILED
            if stop.event.wait(_POLL_S):
                supervisor.send_signal(signal.SIGTERM)
                stop.event.clear()
    on_ready(state)
    return EXIT_OK


def run_background(run_id: str, options: UpOptions, run: RunDirectory) -> int:
    """The detached supervisor's whole life; what it has to say is in the state file."""
    with stop_on_signals() as stop:
        try:
            with local_system(options, run, run_id, stop, lambda _state: None) as supervisor:
                supervisor.watch()
        except StopRequested:
            return EXIT_INTERRUPTED
        except (StartFailed, PlanError, AlreadyRunning) as error:
            sys.stderr.write(f"{error}\n")
            return EXIT_FAILED
    return EXIT_OK


def stop_system(run: RunDirectory, console: Console) -> int:
    """Stops the running system and makes sure that nothing is left; returns the exit status."""
    state = run.load()
    if not run.is_locked():
        num_left = len(living(state)) if state else 0
        survivors = end_all(state) if state else []
        run.forget()
        if survivors:
            return _complain(console, survivors)
        what = f"ended {num_left} left-over processes" if num_left else "Baton is not running"
        console.print(what)
        return EXIT_OK
    if state is None:
        console.print(f"a supervisor is just starting in {run.path}: try again in a moment")
        return EXIT_FAILED
    with console.status("stopping"):
        send([state.supervisor_pid], signal.SIGTERM)
        _wait_unlocked(run, _STOP_TIMEOUT_S)
        if run.is_locked() and is_alive(state.supervisor_pid):
            send([state.supervisor_pid], signal.SIGKILL)
            _wait_unlocked(run, 5.0)
        survivors = end_all(state)
    if survivors:
        return _complain(console, survivors)
    run.forget()
    console.print(f"stopped {len(state.processes)} processes; nothing is left")
    return EXIT_OK


class _Reporter:
    """Shows states: as a live table while starting, later as a line per change."""

    def __init__(self, console: Console, live: ProgressDisplay) -> None:
        self._console = console
        self._live = live
        self._phases: dict[str, str] = {}
        self.say_changes = False

    def __call__(self, state: SystemState) -> None:
        self._live.show(state)
        for process in state.processes:
            previous = self._phases.get(process.name)
            self._phases[process.name] = process.phase
            if self.say_changes and previous not in {None, process.phase}:
                text = f"{process.name}: {process.phase} {process.text}"
                self._console.print(_escape(text.rstrip()), highlight=False)


def _wait_unlocked(run: RunDirectory, timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while run.is_locked() and time.monotonic() < ends_at:
        time.sleep(_POLL_S)


def _complain(console: Console, survivors: list[int]) -> int:
    console.print(f"[bold red]could not end[/] processes {survivors}: try `kill -9`")
    return EXIT_FAILED


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def options_from(document: dict[str, Any]) -> UpOptions:
    """Options as `run_detached` wrote them."""
    return UpOptions(**document)
