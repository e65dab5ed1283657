"""What a process needs of its service, and what it offers to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Generic, Protocol, TypeVar

import grpc

from baton.core.clock import Clock
from baton.core.cluster import ServiceState, WorkerRates
from baton.core.errors import BatonError, NoWorker
from baton.core.hashing import Fingerprint
from baton.rpc.bus import Bus
from baton.rpc.interceptors import DRAIN
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.settings import ServiceSettings
from baton.rpc.telemetry import Telemetry
from baton.wire.channel import ChannelPool
from baton.wire.control import ControlCaller

logger = logging.getLogger(__name__)
S_co = TypeVar("S_co", bound=ServiceSettings, covariant=True)


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """A service's load at one instant."""

    model: str = ""
    models: tuple[str, ...] = ()
    """All models that a tokenizer knows."""
    max_model_len_tokens: int = 0
    """Most tokens of prompt and output together; 0 for a service without a model."""
    fingerprint: Fingerprint | None = None
    kv_blocks: Mapping[str, int] = field(default_factory=dict)
    """By lower-case state name."""
    num_running: int = 0
    num_waiting: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)
    rates: WorkerRates = field(default_factory=WorkerRates)
    store_id: str = ""
    """Of a cache replica with a disk."""


class Service(Protocol):
    """What `process.run` needs of a service. All of it is called on the event loop.

    Order: `register`, then the gRPC server listens (calls are refused with NO_WORKER), `start`,
    READY. Then at the end `drain`, the server's stop, `stop`. `snapshot` and `kv_snapshot` are
    called between the end of `start` and `stop` only.
    """

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Adds its handlers; returns the services' full names, such as "baton.v1.DecodeService"."""

    async def start(self) -> None:
        """Loads what it needs. The process is ready when this returns."""

    def snapshot(self) -> ServiceSnapshot:
        """Its load now; quick."""

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Sequence of the last KV event, and all block hashes in the prefix cache; (0, []) if none.

        The sequence is read together with the hashes.
        """

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new and returns when running work has ended, within `grace_s`."""

    async def stop(self) -> None:
        """Ends what still runs and frees everything; also after a `start` that failed."""


@dataclass(slots=True)
class Lifecycle:
    """Where a process is between its start and its end."""

    state: ServiceState = ServiceState.STARTING
    stop_requested: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int = 0
    grace_s: float | None = None
    """Grace asked for by a Drain call; None for the settings' own."""
    loading_fraction: float = 0.0
    guard: Callable[[str, Mapping[str, str]], BatonError | None] | None = None
    """The service's reason to refuse a call, from its method and metadata; None for none."""

    def refusal(self, method: str, metadata: Mapping[str, str]) -> BatonError | None:
        """Why a call is refused: the service is loading, or its guard says so; None to serve it."""
        if self.state is ServiceState.STARTING and method != DRAIN:
            return NoWorker("the service is still loading", retry_after_s=1.0)
        return self.guard(method, metadata) if self.guard is not None else None

    def fail(self) -> None:
        """Has the process drain and exit with status 1. Call it on the event loop."""
        self.exit_code = self.exit_code or 1
        self.stop_requested.set()


@dataclass(frozen=True, slots=True)
class Runtime(Generic[S_co]):
    """What a service gets from its process; `build(runtime)` makes the service from it."""

    settings: S_co
    role: str
    worker_id: str
    address: str
    """host:port at which others reach this process's gRPC server."""
    metrics_address: str
    telemetry: Telemetry
    metrics: Metrics
    bus: Bus
    members: MembershipView
    channels: ChannelPool
    control: ControlCaller
    rng: Random
    clock: Clock
    lifecycle: Lifecycle

    @property
    def is_draining(self) -> bool:
        """True from the signal to stop on: refuse new work."""
        return self.lifecycle.state is ServiceState.DRAINING

    def report_progress(self, fraction: float, text: str) -> None:
        """Notes how far loading is, in [0, 1]. May be called from any thread."""
        self.lifecycle.loading_fraction = fraction
        logger.info("loading", extra={"fraction": round(fraction, 3), "text": text})

    def request_stop(self, *, exit_code: int = 0, grace_s: float | None = None) -> None:
        """Has the process drain and exit, as a SIGTERM does. Call it on the event loop."""
        self.lifecycle.exit_code = self.lifecycle.exit_code or exit_code
        self.lifecycle.grace_s = grace_s
        self.lifecycle.stop_requested.set()
