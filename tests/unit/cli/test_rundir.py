"""The run directory: one supervisor at a time, and a state file that is never half written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cli.rundir import (
    AlreadyRunning,
    NotARunDirectory,
    ProcessState,
    RunDirectory,
    SystemState,
    run_directory,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "baton")


def state(**changes: object) -> SystemState:
    processes = (ProcessState("decode-1", "decode", pid=7, cores=(0, 1), address="127.0.0.1:1"),)
    fields = {"run_id": "r1", "supervisor_pid": 42, "processes": processes, **changes}
    return SystemState(**fields)  # type: ignore[arg-type]


def test_state_comes_back_as_saved(run: RunDirectory) -> None:
    run.prepare()
    run.save(state(phase="ready", error="x"))
    assert run.load() == state(phase="ready", error="x")
    assert state().process("decode") == state().processes[0]
    assert state().process("prefill") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}', '{"version": 1}', "null"])
def test_unreadable_state_is_no_state(run: RunDirectory, content: str) -> None:
    run.prepare()
    run.state_file.write_text(content)
    assert run.load() is None


def test_second_supervisor_is_refused_while_the_first_lives(run: RunDirectory) -> None:
    assert not run.is_locked()
    with run.lock():
        assert run.is_locked()
        with pytest.raises(AlreadyRunning, match="baton down"), run.lock():
            pass
    assert not run.is_locked()


def test_lock_ends_with_its_holder_and_its_state_does_not_count(run: RunDirectory) -> None:
    script = (
        "import sys, pathlib; from baton.cli.rundir import *\n"
        "run = RunDirectory(pathlib.Path(sys.argv[1]))\n"
        "with run.lock():\n    run.prepare(); run.save(SystemState('r1', 1))\n"
        "    print('up', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        assert run.running() == SystemState("r1", 1)
        holder.kill()
    assert run.running() is None
    assert run.load() is not None
    with run.lock():
        pass


def test_prepare_keeps_the_previous_logs_once_and_forgets_traces(run: RunDirectory) -> None:
    run.prepare()
    (run.logs / "a.log").write_text("one")
    (run.traces / "a.jsonl").write_text("{}")
    (run.ready / "a.json").write_text("{}")
    run.prepare()
    assert (run.logs / "previous" / "a.log").read_text() == "one"
    assert not list(run.logs.glob("*.log"))
    assert not list(run.traces.iterdir())
    assert not list(run.ready.iterdir())


def test_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    assert run_directory().path == tmp_path
    monkeypatch.delenv("BATON_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert run_directory().path == tmp_path / "state" / "baton"


def test_state_file_is_plain_json(run: RunDirectory) -> None:
    run.prepare()
    run.save(state())
    document = json.loads(run.state_file.read_text())
    assert document["processes"][0]["name"] == "decode-1"


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("traces/a.jsonl", "logs/a.log", "ready/b", "main.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    run = RunDirectory(tmp_path)
    for use in (run.prepare, run.claim, run.lock().__enter__):
        with pytest.raises(NotARunDirectory, match="BATON_HOME"):
            use()
    assert all(file.read_text() == "mine" for file in files)
    assert not (tmp_path / "lock").exists()
