"""`baton up`, `status`, `generate`, `trace` and `down` on real processes with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.cli.leftovers import living
from baton.cli.rundir import RunDirectory, SystemState
from tests.support.eventually import eventually
from tests.support.tiny_models import make_tiny_model

START_TIMEOUT_S = 50


class Cli:
    """Runs the command against a run directory of its own."""

    def __init__(self, home: Path) -> None:
        self.run_directory = RunDirectory(home)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "baton.cli.main", *arguments],
            env={**os.environ, "BATON_HOME": str(self.run_directory.path), "COLUMNS": "120"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        with self.start(*arguments) as command:
            try:
                out, err = command.communicate(text, timeout=START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                command.kill()
                raise
            return subprocess.CompletedProcess(arguments, command.returncode, out, err)

    def state(self) -> SystemState:
        state = self.run_directory.running()
        assert state is not None
        return state

    def status(self) -> dict[str, Any]:
        result = self("status", "--json")
        assert result.returncode == 0, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        return document


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cli]:
    command = Cli(tmp_path_factory.mktemp("home"))
    try:
        result = command("up", "-d", "--model", str(model), "--kv-bytes", "8000000", "--json")
        assert result.returncode == 0, result.stderr
        told = json.loads(result.stdout)
        assert told["console"].startswith("http://127.0.0.1:")
        assert {process["role"] for process in told["processes"]} >= {"prefill", "decode", "nats"}
        yield command
    finally:
        command("down")


def by_role(status: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    roles: dict[str, list[dict[str, Any]]] = {}
    for service in status["services"]:
        roles.setdefault(service["role"], []).append(service)
    return roles


def test_status_shows_every_service_and_the_workers_blocks(cli: Cli) -> None:
    status = cli.status()
    assert status["bus_connected"] is True
    roles = by_role(status)
    assert set(roles) == {"gateway", "scheduler", "tokenizer", "prefill", "decode", "cache"}
    assert {service["state"] for service in status["services"]} == {"ready"}
    for worker in (*roles["prefill"], *roles["decode"]):
        assert worker["kv_blocks"]["free"] > 0
    table = cli("status")
    assert table.returncode == 0
    assert roles["decode"][0]["worker_id"] in table.stdout


def test_generated_text_is_traced_across_processes(cli: Cli) -> None:
    prompt = "def f(x): return x + 1\n" * 8
    arguments = ("generate", "-", "--max-tokens", "5", "--temperature", "0")
    streamed = cli(*arguments, text=prompt)
    assert streamed.returncode == 0, streamed.stderr
    result = cli(*arguments, "--json", text=prompt)
    completion = json.loads(result.stdout)
    assert completion["text"] + "\n" == streamed.stdout
    assert completion["usage"]["completion_tokens"] <= 5
    ends_at = time.monotonic() + 5
    names: set[str] = set()
    while "decode" not in names and time.monotonic() < ends_at:
        found = cli("trace", completion["trace_id"], "--json")
        spans = json.loads(found.stdout)["spans"] if found.returncode == 0 else []
        names = {span["name"] for span in spans}
    assert {"tokenize", "reserve", "decode"} <= names
    assert {"scheduler", "tokenizer", "decode"} <= {span["service"] for span in spans}
    assert "tokenize" in cli("trace").stdout


def test_the_doctor_finds_nothing_wrong(cli: Cli) -> None:
    result = cli("doctor", "--json", "--probe-mib", "1")
    assert result.returncode == 0, result.stdout
    document = json.loads(result.stdout)
    assert document["healthy"] is True
    assert len(document["paths"]) == 1


def test_bench_measures_the_system(cli: Cli) -> None:
    arguments = ("--requests", "6", "-c", "2", "--max-tokens", "4", "--prompt-words", "8")
    result = cli("bench", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["requests"] == {"ok": 6, "failed": {}, "skipped": 0}
    assert 0 < figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p99"]
    assert "goodput" in cli("bench", *arguments).stdout


def test_an_answer_is_held_to_a_choice(cli: Cli) -> None:
    result = cli("generate", "x", "--choice", "apples", "--choice", "pears", "--temperature", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in {"apples", "pears"}


def test_second_system_in_the_same_place_is_refused(cli: Cli, model: Path) -> None:
    result = cli("up", "-d", "--model", str(model))
    assert result.returncode == 1
    assert "baton down" in result.stderr
    assert cli.state().phase == "ready"


def test_errors_say_what_to_do(cli: Cli, tmp_path: Path) -> None:
    nobody = Cli(tmp_path / "other")
    assert "baton up" in nobody("status").stderr
    assert nobody("status").returncode == 1
    assert nobody("down").returncode == 0
    missing = nobody("up", "--model", str(tmp_path))
    assert missing.returncode == 1
    assert "config.json" in missing.stderr
    wrong = cli("generate", "x", "--model", "no-such-model")
    assert wrong.returncode == 1
    assert "model_not_found" in wrong.stderr
    assert cli("trace", "no-such-request").returncode == 1


async def test_an_interrupted_start_says_so_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    other = Cli(tmp_path / "other")
    run = other.run_directory
    with other.start("up", "-d", "--model", str(model)) as command:
        await eventually(lambda: run.load() is not None, timeout_s=START_TIMEOUT_S)
        state = run.load()
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=START_TIMEOUT_S)
    assert said.endswith("interrupted while starting: everything was stopped\n")
    assert command.returncode == 130
    assert state is not None
    assert living(state) == []
    assert not run.is_locked()


def test_status_without_a_scheduler_asks_each_service_and_down_leaves_nothing(cli: Cli) -> None:
    state = cli.state()
    scheduler = state.process("scheduler")
    assert scheduler is not None
    os.kill(scheduler.pid, signal.SIGSTOP)
    roles = by_role(cli.status())
    assert roles["scheduler"][0]["state"] == "lost"
    assert roles["decode"][0]["state"] == "ready"
    assert sum(roles["decode"][0]["kv_blocks"].values()) > 0
    os.kill(scheduler.pid, signal.SIGCONT)
    result = cli("down", "--json")
    assert result.returncode == 0, result.stderr
    assert "nothing is left" in result.stderr
    assert json.loads(result.stdout) == {"was_running": True, "is_down": True}
    assert living(state) == []
    assert cli.run_directory.load() is None
