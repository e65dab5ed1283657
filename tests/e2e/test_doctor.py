"""`baton doctor` on real processes: well, with a worker of another model, and with a dead one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.system import System
from tests.support.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(180)


async def doctor(system: System, *options: str) -> tuple[int, str]:
    done = await asyncio.to_thread(
        subprocess.run,
        [
            *(sys.executable, "-m", "baton.cli.main", "doctor", *options),
            *("--address", system.processes[2].address),
        ],
        env={**os.environ, "BATON_HOME": str(system.directory / "home"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


async def findings(system: System) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
    exit_code, text = await doctor(system, "--json", "--probe-mib", "2")
    document = json.loads(text)
    return exit_code, document, [f for f in document["findings"] if f["level"] == "error"]


async def test_the_doctor_tells_what_is_wrong(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "tiny")
    other = make_tiny_model("llama", tmp_path / "other", seed=5)
    async with System(tmp_path / "system", {"tiny": path}) as system:
        prefill, decode = await system.workers("tiny")
        exit_code, document, errors = await findings(system)
        assert (exit_code, document["healthy"], errors) == (0, True, [])
        (way,) = document["paths"]
        assert (way["prefill"], way["decode"]) == (prefill.worker_id, decode.worker_id)
        assert way["bytes_per_s"] > 0
        assert prefill.worker_id in document["clock_offsets_s"]
        exit_code, text = await doctor(system)
        assert exit_code == 0
        assert "MB/s" in text
        assert "0 errors" in text

        stranger = system.spawn(
            "prefill", model_path=other, model_name="tiny", dtype="float32", num_blocks=64
        )
        await system.wait_ready(stranger)
        await system.wait_members(stranger)
        exit_code, document, errors = await findings(system)
        assert (exit_code, document["healthy"]) == (1, False)
        (error,) = errors
        assert error["check"] == "compatibility"
        assert f"{stranger.worker_id} at {stranger.address}" in error["text"]
        assert "weights: " in error["text"]
        assert "same model directory" in error["advice"]

        decode.kill()

        async def is_missed() -> bool:
            status = await system.client.status()
            return any(
                s.worker_id == decode.worker_id and s.state.value == "lost" for s in status.services
            )

        await eventually(is_missed, timeout_s=15)
        exit_code, _, errors = await findings(system)
        assert exit_code == 1
        texts = [error["text"] for error in errors if error["check"] == "services"]
        assert any(f"{decode.worker_id} at {decode.address} does not answer" in t for t in texts)
        assert any("there is no decode" in text for text in texts)


async def test_without_a_system_the_doctor_says_so(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "baton.cli.main", "doctor", "--json"],
        env={**os.environ, "BATON_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    finding, *_ = json.loads(done.stdout)["findings"]
    assert "no Baton runs here" in finding["text"]
