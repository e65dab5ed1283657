"""The processes that are measured: real services, on cores of their own where there are enough."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from baton.core.cluster import ServiceState
from baton.core.errors import BatonError
from baton.wire.channel import ChannelPool
from baton.wire.control import RpcControl

_START_TIMEOUT_S = 180.0
_TAIL_CHARS = 2000
MAX_MESSAGE_BYTES = 64 << 20


def core_of(index: int) -> str:
    """One of the cores that this process may use, as a setting."""
    cores = sorted(os.sched_getaffinity(0))
    return str(cores[index % len(cores)])


class Processes:
    """Services of one measurement; all of them end with it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[subprocess.Popen[bytes]] = []
        self.channels = ChannelPool(max_message_bytes=MAX_MESSAGE_BYTES)
        self.control = RpcControl(self.channels)

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.channels.close()
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def start(self, role: str, **settings: object) -> str:
        """Starts a service and waits until it is ready; returns its address.

        Raises:
            RuntimeError: it ended, or was not ready in time.
        """
        port = _free_port()
        log_path = self._logs / f"{role}-{port}.log"
        given = {"port": port, "nats_url": "", "drain_grace_s": 1, **settings}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - takes milliseconds
                [sys.executable, "-m", f"baton.{role}", *flags], stdout=log, stderr=log
            )
        self._started.append(process)
        address = f"127.0.0.1:{port}"
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                announcement = await self.control.status(address, lease_s=1.0)
            except BatonError:
                await asyncio.sleep(0.1)
                continue
            if announcement.status.state is ServiceState.READY:
                return address
            await asyncio.sleep(0.1)
        tail = log_path.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:]
        raise RuntimeError(f"{role} did not become ready:\n{tail}")

    async def cpu_s(self, address: str) -> float:
        """Processor time that a service has taken so far, in seconds."""
        pid = (await self.control.status(address, lease_s=1.0)).status.pid
        stat = Path(f"/proc/{pid}/stat").read_text("ascii")  # noqa: ASYNC240 - no disk
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
