"""A whole Baton of real processes on loopback, for the end-to-end tests.

Not the product's supervisor: it starts, kills and restarts single services on purpose.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from baton.client import AsyncClient
from baton.v1.control_pb2 import GetStatusRequest
from baton.v1.control_pb2_grpc import ControlServiceStub
from tests.support.eventually import eventually
from tests.support.repository import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from baton.v1.inference_pb2 import ServiceStatus

START_TIMEOUT_S = 90.0
FAULTS_VARIABLE = "BATON_TEST_FAULTS"
"""See tests.support.faulty_prefill, which this process does not import: it loads torch."""
KEPT_STATES = frozenset({"free", "cached"})


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """One running service."""

    role: str
    popen: subprocess.Popen[bytes]
    log: Path
    ready_file: Path
    address: str = ""
    worker_id: str = ""

    def kill(self) -> None:
        """kill -9, and reap."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)

    def log_tail(self) -> str:
        """The end of its log, for failure messages."""
        return self.log.read_text(errors="replace")[-4000:]


@dataclass
class System:
    """Starts services, knows their addresses, and ends every process that it started."""

    directory: Path
    models: dict[str, Path]
    processes: list[Process] = field(default_factory=list)
    num_started: int = 0
    nats_port: int = field(default_factory=free_port)
    nats: subprocess.Popen[bytes] | None = None
    client: AsyncClient = field(init=False)

    async def __aenter__(self) -> System:
        """Starts the broker, tokenizer, cache and scheduler."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.start_nats()
            models = ",".join(f"{name}={path}" for name, path in self.models.items())
            light = [
                self.spawn("tokenizer", models=models),
                self.spawn("cache", **self.cache_settings()),
                self.spawn("scheduler", **self.scheduler_settings()),
            ]
            await self.wait_ready(*light)
            self.client = AsyncClient(light[2].address, timeout_s=50.0)
        except BaseException:
            self.end_processes()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends everything, whatever happened."""
        try:
            await self.client.close()
        finally:
            self.end_processes()

    def scheduler_settings(self) -> dict[str, object]:
        """Disaggregation is forced, so that a test never passes by computing locally."""
        return {"force_disaggregation": "true"}

    def cache_settings(self) -> dict[str, object]:
        """Memory only."""
        return {}

    def start_nats(self) -> None:
        """Starts the broker at this system's port, or starts it again."""
        binary = Path(sys.executable).parent / "nats-server"
        store = self.directory / "nats"
        command = [
            str(binary),
            "-a",
            "127.0.0.1",
            "-p",
            str(self.nats_port),
            "-js",
            "-sd",
            str(store),
        ]
        with (self.directory / "nats.log").open("ab") as log:
            self.nats = subprocess.Popen(command, stdout=log, stderr=log)

    def kill_nats(self) -> None:
        """kill -9 of the broker."""
        if self.nats is not None:
            self.nats.kill()
            self.nats.wait(10)
            self.nats = None

    def spawn(self, role: str, *, fault: str = "", **settings: object) -> Process:
        """Starts one service, a prefill worker with faults if asked; `wait_ready` waits for it."""
        self.num_started += 1
        number = self.num_started
        log = self.directory / f"{role}-{number}.log"
        ready_file = self.directory / f"{role}-{number}.ready"
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "BATON_READY_FILE": str(ready_file),
            "BATON_NATS_URL": f"nats://127.0.0.1:{self.nats_port}",
            "BATON_TRACE_DIR": str(self.directory / "traces"),
        }
        for name, value in settings.items():
            env[f"BATON_{role.upper()}_{name.upper()}"] = str(value)
        module = f"baton.{role}"
        if fault:
            module, env[FAULTS_VARIABLE] = "tests.support.faulty_prefill", fault
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", module], stdout=out, stderr=out, env=env, cwd=ROOT
            )
        process = Process(role, popen, log, ready_file)
        self.processes.append(process)
        return process

    async def worker(self, role: str, model: str, **settings: object) -> Process:
        """Starts a prefill or decode worker for one of the models, without waiting."""
        defaults = {"dtype": "float32", "num_blocks": 512, "num_threads": 1}
        path = self.models[model]
        return self.spawn(role, model_path=path, model_name=model, **{**defaults, **settings})

    async def workers(self, model: str, prefill: int = 1, decode: int = 1) -> list[Process]:
        """Starts plain workers for a model and waits until the scheduler sees them."""
        started = [await self.worker("prefill", model) for _ in range(prefill)]
        started += [await self.worker("decode", model) for _ in range(decode)]
        await self.wait_ready(*started)
        await self.wait_members(*started)
        return started

    async def wait_ready(self, *processes: Process) -> None:
        """Waits for the ready files; fails with the log of a service that ended."""
        for process in processes:

            def is_ready(process: Process = process) -> bool:
                if process.popen.poll() is not None:
                    raise RuntimeError(f"{process.role} ended:\n{process.log_tail()}")
                return process.ready_file.exists()

            await eventually(is_ready, timeout_s=START_TIMEOUT_S, interval_s=0.05)
            ready = json.loads(process.ready_file.read_text())
            process.address, process.worker_id = ready["address"], ready["worker_id"]

    async def wait_members(self, *processes: Process) -> None:
        """Waits until the scheduler knows the services as ready."""
        wanted = {process.worker_id for process in processes}

        async def known() -> bool:
            status = await self.client.status()
            ready = {
                service.worker_id for service in status.services if service.state.value == "ready"
            }
            return wanted <= ready

        await eventually(known, timeout_s=10.0, interval_s=0.05)

    async def held_blocks(self) -> dict[str, dict[str, int]]:
        """Per live worker, its blocks in any state but free and cached, by its own word."""
        held = {}
        for process in self.processes:
            if process.role in {"prefill", "decode"} and process.popen.poll() is None:
                status = await self.service_status(process)
                counts = {k: v for k, v in status.kv_blocks.items() if v and k not in KEPT_STATES}
                if counts:
                    held[f"{process.role}:{process.worker_id}"] = counts
        return held

    async def service_status(self, process: Process) -> ServiceStatus:
        """What a service says about itself."""
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = ControlServiceStub(channel)
            return (await stub.GetStatus(GetStatusRequest(), timeout=2.0)).status

    async def assert_nothing_held(self, timeout_s: float = 2.0) -> None:
        """The product's promise: after a request's end, within two seconds, no block is held."""
        ends_at = time.monotonic() + timeout_s
        while held := await self.held_blocks():
            assert time.monotonic() < ends_at, f"still held after {timeout_s} s: {held}"
            await asyncio.sleep(0.02)

    async def retire(self, *processes: Process) -> None:
        """SIGTERM, and waits for a clean exit."""
        for process in processes:
            process.popen.send_signal(signal.SIGTERM)
        for process in processes:
            status = await asyncio.to_thread(process.popen.wait, 20)
            assert status == 0, f"{process.role} exited with {status}:\n{process.log_tail()}"
            self.processes.remove(process)

    async def greedy(self, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
        """So many tokens of a streamed answer, the likeliest each time."""
        return await collect(
            self.client.generate(
                token_ids=list(prompt),
                max_tokens=num_tokens,
                temperature=0.0,
                ignore_eos=True,
                return_token_ids=True,
                stream=True,
                **options,
            )
        )

    def end_processes(self) -> None:
        """Ends what is left, in the reverse order of starting."""
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)
        ends_at = time.monotonic() + 10
        for process in self.processes:
            try:
                process.popen.wait(max(0.1, ends_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.kill_nats()


async def collect(stream: Any) -> list[int]:
    """All token ids of a streamed answer."""
    token_ids: list[int] = []
    async for chunk in stream:
        token_ids.extend(chunk.token_ids)
    return token_ids
