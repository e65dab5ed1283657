"""What a start says of itself, and what the detached supervisor leaves for its starter to read."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from baton.cli.plan import UpOptions
from baton.cli.progress import ProgressDisplay
from baton.cli.rundir import ProcessState, RunDirectory, SystemState
from baton.cli.up import EXIT_FAILED, run_background


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


def test_a_supervisor_that_comes_second_says_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    with run.lock():
        assert run_background("r", UpOptions("m", "m"), run) == EXIT_FAILED
    assert "already runs here" in capfd.readouterr().err
