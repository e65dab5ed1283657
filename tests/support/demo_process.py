"""The demo service as a process that a test starts, watches and kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.wire.channel import ChannelPool
from baton.wire.control import RpcControl
from tests.support.demo_service import NAME
from tests.support.eventually import eventually
from tests.support.nats import free_port
from tests.support.repository import ROOT


class Demo:
    """The demo service as a process."""

    def __init__(self, folder: Path, nats_url: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._nats_url = nats_url
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.pool = ChannelPool(max_message_bytes=1 << 20)
        self.control = RpcControl(self.pool)
        self.gate = folder / "gate"
        self.loaded = folder / "loaded"
        self.stopped = folder / "stopped"
        self._ready = folder / "ready.json"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        arguments = ["--port", str(self.port), "--nats-url", self._nats_url]
        arguments += ["--gate-file", str(self.gate)]
        environment = {
            **os.environ,
            "BATON_READY_FILE": str(self._ready),
            "DEMO_STOPPED": str(self.stopped),
        }
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.demo_service", *arguments, *flags],
                cwd=ROOT,
                env=environment,
                stderr=log,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        assert self._process is not None
        process = self._process
        await eventually(lambda: process.poll() is not None, timeout_s=20)
        return int(process.returncode)

    async def ready(self) -> dict[str, Any]:
        await eventually(self._ready.exists, timeout_s=20)
        return dict(json.loads(self._ready.read_text()))

    def lines(self) -> list[dict[str, Any]]:
        """The log; every line of it must be JSON, but for those of gRPC's own core."""
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if not re.match(r"[EWI]\d{4} ", line)]

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines()]

    def wait_call(self, timeout_s: float = 30) -> Any:
        return self.pool.get(self.address).unary_stream(f"/{NAME}/Wait")(b"", timeout=timeout_s)

    async def health(self, name: str = "") -> Any:
        stub = health_pb2_grpc.HealthStub(self.pool.get(self.address))
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            return (await stub.Check(request, timeout=2)).status
        except grpc.aio.AioRpcError as error:
            return error.code()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
