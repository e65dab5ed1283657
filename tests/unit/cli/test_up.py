"""What a start says of itself, and what the detached supervisor leaves for its starter to read."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from threading import Event
from typing import cast
from unittest.mock import patch

import pytest
import typer
from rich.console import Console

from baton.cli.background import run_background
from baton.cli.models import demo_pair
from baton.cli.plan import PlanError, SystemPlan, UpOptions
from baton.cli.rundir import ProcessState, RunDirectory, SystemState
from baton.cli.supervisor import StopSignal
from baton.cli.up import EXIT_FAILED, local_system
from baton.cli.up_output import ProgressDisplay, print_ready
from baton.cli.user_errors import explained


def printed(*states: SystemState) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=False)
    with ProgressDisplay(console) as display:
        for state in states:
            display.show(state)
    console.print("next")
    return file.getvalue()


def test_what_follows_the_progress_in_a_file_begins_on_its_own_line() -> None:
    process = ProcessState("decode-1", "decode", phase="ready")
    first, second = printed(SystemState("r", 1, processes=(process,))).splitlines()
    assert first.startswith("decode-1")
    assert second == "next"
    assert printed() == "next\n"


def test_what_the_system_refuses_is_one_line() -> None:
    file = StringIO()
    with pytest.raises(typer.Exit) as ended, explained(Console(file=file)):
        RunDirectory(Path("/proc/nowhere")).prepare()
    assert ended.value.exit_code == 1
    assert "/proc/nowhere" in file.getvalue()
    with pytest.raises(BrokenPipeError), explained(Console(file=file)):
        raise BrokenPipeError


def test_nothing_is_known_of_an_earlier_run_while_the_next_one_starts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.prepare()
    run.save(SystemState("earlier", supervisor_pid=1))
    seen: list[SystemState | None] = []

    def look(*_: object) -> SystemPlan:
        seen.append(run.load())
        raise PlanError("that was enough")

    with (
        patch("baton.cli.up.make_plan", look),
        pytest.raises(PlanError),
        local_system(UpOptions("m", "m"), run, "later", StopSignal(Event()), lambda _state: None),
    ):
        pass
    assert seen == [None], "`down` would signal the earlier supervisor's pid"


def test_a_supervisor_that_comes_second_says_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    with run.lock():
        assert run_background("r", UpOptions("m", "m"), run) == EXIT_FAILED
    assert "already runs here" in capfd.readouterr().err


def test_the_next_steps_suggest_python_for_the_demo_model_only() -> None:
    def steps(model: str) -> str:
        console = Console(file=StringIO(), width=100)
        print_ready(console, SystemState("r", 1, model=model), detached=True, as_json=False)
        return cast("StringIO", console.file).getvalue()

    assert 'baton generate "def main():"' in steps(str(demo_pair().target))
    assert "def main" not in steps("/models/other")
    assert "baton generate" in steps("/models/other")
