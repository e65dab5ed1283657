"""The supervisor on small real processes: starts, reports, restarts, stops, leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer

import pytest

from baton.cli import child
from baton.cli.leftovers import end_all, is_alive, living
from baton.cli.plan import ProcessSpec, SystemPlan, UpOptions
from baton.cli.rundir import RUN_ID_VARIABLE, RunDirectory, SystemState
from baton.cli.supervised_process import LogFollower, describe_exit, tail
from baton.cli.supervisor import StartFailed, StopRequested, StopSignal, Supervisor
from tests.support.eventually import eventually

BECOME_READY = """
import json, os, pathlib, signal
path = pathlib.Path(os.environ["BATON_READY_FILE"])
path.with_suffix(".tmp").write_text(json.dumps({"address": "127.0.0.1:7", "event": "ready"}))
path.with_suffix(".tmp").rename(path)
signal.pause()
"""
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BECOME_READY
FAIL = "import sys; print('no such weights', file=sys.stderr); sys.exit(3)"
NEVER_READY = "import signal; signal.pause()"


class Setup:
    """A plan of scripts, and everything that the supervisor said."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDirectory(directory)
        self.run.prepare()
        self.stop = StopSignal(Event())
        self.states: list[SystemState] = []
        self.on_state: Callable[[SystemState], None] = self.states.append
        self.run_id = f"test-{directory.name}-{os.getpid()}"

    def supervisor(self, **scripts: str) -> Supervisor:
        options = UpOptions("m", "m", drain_grace_s=-4.5, start_timeout_s=10)
        processes = tuple(self._spec(name, script) for name, script in scripts.items())
        plan = SystemPlan(self.run_id, options, "", processes)

        def has_joined(_address: str, _plan: SystemPlan) -> bool:
            return True

        def listen(state: SystemState) -> None:
            self.on_state(state)

        return Supervisor(plan, self.run, self.stop, listener=listen, has_joined=has_joined)

    def _spec(self, name: str, script: str) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            role=name,
            command=(sys.executable, "-I", "-S", "-c", script),
            environment={
                RUN_ID_VARIABLE: self.run_id,
                "BATON_READY_FILE": str(self.run.ready / f"{name}.json"),
            },
            address="127.0.0.1:1",
        )


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def phases(state: SystemState | None) -> dict[str, str]:
    return {process.name: process.phase for process in state.processes} if state else {}


def test_system_gets_ready_and_ends_without_leftovers(setup: Setup) -> None:
    supervisor = setup.supervisor(scheduler=BECOME_READY, decode=BECOME_READY)
    supervisor.start()
    state = setup.run.load()
    assert state is not None
    assert state.phase == "ready"
    assert phases(state) == {"scheduler": "ready", "decode": "ready"}
    assert state.processes[0].address == "127.0.0.1:7", "the address is the process's own word"
    assert len(living(state)) == 2
    assert supervisor.stop()
    assert living(state) == []
    assert phases(setup.run.load()) == {"scheduler": "stopped", "decode": "stopped"}


def test_failed_start_shows_the_log(setup: Setup) -> None:
    supervisor = setup.supervisor(scheduler=BECOME_READY, decode=FAIL)
    with pytest.raises(StartFailed, match=r"(?s)decode exited with status 3.*no such weights"):
        supervisor.start()
    supervisor.stop()
    assert living(supervisor.state) == []


def test_stop_while_starting_is_heeded(setup: Setup) -> None:
    supervisor = setup.supervisor(scheduler=NEVER_READY)
    setup.stop.request()
    with pytest.raises(StopRequested):
        supervisor.start()
    assert supervisor.stop()
    assert living(supervisor.state) == []


def test_a_full_disk_leaves_the_system_as_it_is(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    supervisor = setup.supervisor(scheduler=BECOME_READY)
    supervisor.start()

    def fail(_run: RunDirectory, _state: SystemState) -> None:
        setup.stop.request()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDirectory, "save", fail)
    process = supervisor.state.process("scheduler")
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    supervisor.watch()
    assert "system.json: No space left on device" in capfd.readouterr().err
    assert supervisor.stop()
    assert living(supervisor.state) == []


def test_process_that_ignores_sigterm_is_killed(setup: Setup) -> None:
    supervisor = setup.supervisor(scheduler=IGNORE_SIGTERM)
    supervisor.start()
    assert supervisor.stop()
    assert living(supervisor.state) == []


def test_crashed_process_is_started_again(setup: Setup) -> None:
    supervisor = setup.supervisor(scheduler=BECOME_READY, decode=BECOME_READY)
    supervisor.start()
    first = supervisor.state.process("decode")
    assert first is not None

    def stop_when_back(state: SystemState) -> None:
        process = state.process("decode")
        if process and process.phase == "ready" and process.pid != first.pid:
            setup.stop.request()

    setup.on_state = stop_when_back
    watchdog = Timer(20, setup.stop.request)
    watchdog.start()
    os.kill(first.pid, signal.SIGKILL)
    supervisor.watch()
    watchdog.cancel()
    second = supervisor.state.process("decode")
    assert second is not None
    assert (second.phase, second.num_restarts) == ("ready", 1)
    assert second.pid != first.pid
    assert supervisor.stop()


def test_progress_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    follower = LogFollower(log)
    assert follower.progress() is None
    line = b'{"event": "loading", "fraction": 0.25, "text": "weights"}\n'
    log.write_bytes(b"noise\n" + line[:20])
    assert follower.progress() is None
    log.write_bytes(b"noise\n" + line + b'{"event": "other"}\n[1, 2]\n')
    assert follower.progress() == (0.25, "weights")
    assert follower.progress() is None, "only what is new"


def test_tail_is_readable(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text('{"level": "error", "event": "start failed", "path": "/m"}\nTraceback\n')
    assert tail(log) == "error: start failed path=/m\nTraceback"
    assert tail(tmp_path / "none.log") == ""


def test_exits_have_names() -> None:
    assert describe_exit(2) == "exited with status 2"
    assert describe_exit(-9) == "killed by SIGKILL"


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
async def test_child_dies_with_its_parent() -> None:
    """A parent that is killed with SIGKILL, and so cannot tell anybody, takes its child along."""
    parent_script = (
        "import os, subprocess, sys\n"
        "process = subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1], str(os.getpid()),"
        " sys.executable, '-I', '-S', '-c',"
        " 'import os, signal; print(os.getpid(), flush=True); signal.pause()'],"
        " start_new_session=True)\n"
        "process.wait()\n"
    )
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-I", "-S", "-c", parent_script, child.__file__], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    await eventually(lambda: not is_alive(pid))


def test_child_does_not_start_without_its_parent() -> None:
    command = [sys.executable, "-I", "-S", child.__file__, "1", sys.executable, "-c", "pass"]
    assert subprocess.run(command, check=False).returncode == child.PARENT_GONE_EXIT_CODE


def test_leftovers_of_a_run_are_found_and_ended(tmp_path: Path) -> None:
    state = SystemState(run_id=f"left-{tmp_path.name}-{os.getpid()}", supervisor_pid=0)
    environment = {**os.environ, RUN_ID_VARIABLE: state.run_id}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import signal; print(1, flush=True); signal.pause()"],
        env=environment,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert living(state) == [process.pid]
        assert end_all(state) == []
        assert process.wait(5) == -signal.SIGKILL
