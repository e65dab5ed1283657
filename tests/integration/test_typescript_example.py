"""The TypeScript example, built and run with npm's packages where node and they are at hand."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from baton.core.errors import QueueFull
from tests.support.fake_inference import FakeInference, serve
from tests.support.repository import ROOT

EXAMPLE = ROOT / "examples" / "typescript"
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("typescript")
    for path in EXAMPLE.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    try:
        done = subprocess.run(
            INSTALL, cwd=folder, capture_output=True, text=True, timeout=100, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm install takes too long here")
    if done.returncode != 0:
        pytest.skip(f"npm cannot install the example's packages: {done.stderr[-300:]}")
    subprocess.run(("npm", "run", "build"), cwd=folder, timeout=100, check=True)
    return folder / "dist" / "stream.js"


async def _run(program: Path, address: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        "node",
        program,
        address,
        "say",
        env={**os.environ, "BATON_PROTOS": str(ROOT / "protos"), "BATON_API_KEY": "a-key"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    return process.returncode, out.decode(), errors.decode()


@pytest.mark.timeout(240)
async def test_the_example_streams_a_completion_and_names_a_refusal(program: Path) -> None:
    fake = FakeInference()
    server, address = await serve(fake)
    try:
        code, out, errors = await _run(program, address)
        assert (code, errors) == (0, "")
        assert out == "Hello wörld!\nFINISH_REASON_STOP: 7 + 3 tokens\n"
        [request] = fake.requests
        assert (request.text, request.sampling.max_tokens) == ("say", 64)
        assert request.sampling.temperature == 0.0
        assert fake.metadata[0]["authorization"] == "Bearer a-key"
        fake.before.append(QueueFull("too many"))
        code, _, errors = await _run(program, address)
        assert (code, errors) == (1, "QUEUE_FULL: too many\n")
    finally:
        await server.stop(0)
