"""The gateway and what stands behind it, as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Front:
    """A running gateway."""

    pid: int
    host: str
    port: int


def cores() -> tuple[list[int], list[int]]:
    """One core for the gateway, the others for everything else (the same one if it is alone)."""
    available = sorted(os.sched_getaffinity(0))
    return available[-1:], available[:-1] or available


@contextmanager
def _process(
    command: Sequence[str], environment: dict[str, str] | None = None, **options: int
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **(environment or {})},
        cwd=_REPOSITORY,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def mock_scheduler() -> Iterator[str]:
    """The mock's address."""
    command = ["-m", "benchmarks.gateway.mock"]
    with _process(command, stdout=subprocess.PIPE) as process:
        if process.stdout is None or not (address := process.stdout.readline().strip()):
            raise RuntimeError("the mock scheduler did not start")
        yield address


@contextmanager
def gateway(scheduler: str, folder: Path, core: Sequence[int]) -> Iterator[Front]:
    """A gateway pinned to `core`, in front of the scheduler at an address."""
    ready_file, log = folder / "gateway.ready", folder / "gateway.log"
    flags = ["--scheduler", scheduler, "--http-port", "0", "--nats-url", ""]
    pinned = ["--cores", ",".join(map(str, core))]
    with (
        log.open("wb") as out,
        _process(
            ["-m", "baton.gateway", *flags, *pinned],
            {"BATON_READY_FILE": str(ready_file)},
            stderr=out.fileno(),
        ) as process,
    ):
        gives_up_s = time.monotonic() + START_TIMEOUT_S
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() > gives_up_s:
                raise RuntimeError(f"the gateway did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        host, _, port = _http_address(log).rpartition(":")
        yield Front(process.pid, host, int(port))


def _http_address(log: Path) -> str:
    for line in log.read_text(encoding="utf-8").splitlines():
        if '"http_address"' in line:
            return str(json.loads(line)["http_address"])
    raise RuntimeError("the gateway did not say where it serves")
